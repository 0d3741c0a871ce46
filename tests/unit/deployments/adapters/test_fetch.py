"""The file of an adapter: which it is, that it is whole and the one that is meant, and what a caller learns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from deployments.adapters import fetch
from deployments.adapters.fetch import fetch_file
from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError, StageUnavailableError


def refused(use: AdapterUse, cache: Path) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        fetch_file(use, cache)
    assert caught.value.param == "loras"
    return str(caught.value)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("ink.safetensors", "neon.safetensors", "old.bin", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_file_is_used_where_it_is_and_known_by_its_digest(place: Path, tmp_path: Path) -> None:
    found = fetch_file(AdapterUse("ink", str(place / "ink.safetensors")), tmp_path)
    assert (found.path, found.num_bytes) == (place / "ink.safetensors", 15)
    assert found.digest == hashlib.sha256(b"ink.safetensors").hexdigest()


def test_of_a_folder_with_several_files_one_must_be_chosen(place: Path, tmp_path: Path) -> None:
    use = AdapterUse("ink", str(place))
    assert "choose one with weight_name: ink.safetensors, neon.safetensors" in refused(use, tmp_path)
    chosen = AdapterUse("ink", str(place), "neon.safetensors")
    assert fetch_file(chosen, tmp_path).path == place / "neon.safetensors"
    gone = AdapterUse("ink", str(place), "gone.safetensors")
    assert "no file gone.safetensors; there are ink.safetensors, neon.safetensors" in refused(gone, tmp_path)
    (place / "neon.safetensors").unlink()
    assert fetch_file(use, tmp_path).path == place / "ink.safetensors"


def test_a_pickle_is_never_read(place: Path, tmp_path: Path) -> None:
    assert "no other kind is read" in refused(AdapterUse("old", str(place / "old.bin")), tmp_path)
    (place / "ink.safetensors").unlink()
    (place / "neon.safetensors").unlink()
    assert "no .safetensors file" in refused(AdapterUse("old", str(place)), tmp_path)


def test_a_file_that_was_replaced_is_refused(place: Path, tmp_path: Path) -> None:
    file = place / "ink.safetensors"
    digest = fetch_file(AdapterUse("ink", str(file)), tmp_path).digest
    assert fetch_file(AdapterUse("ink", str(file), digest=digest), tmp_path).digest == digest
    file.write_bytes(b"another")
    assert "its file was replaced" in refused(AdapterUse("ink", str(file), digest=digest), tmp_path)


def test_a_file_that_is_far_too_large_for_an_adapter_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 4)
    assert "has 15 bytes" in refused(AdapterUse("ink", str(place / "ink.safetensors")), tmp_path)


def test_a_path_that_is_nothing_is_told_without_naming_it(tmp_path: Path) -> None:
    said = refused(AdapterUse("ink", str(tmp_path / "secret" / "nowhere")), tmp_path)
    assert "nor a hub repository" in said
    assert "secret" not in said


class Bucket:
    """What boto3's client shows of a bucket; `error` is raised by every call."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.error: Exception | None = None
        self.opened: list[str] = []
        self.cut_at: int | None = None

    def get_paginator(self, _: str) -> Bucket:
        return self

    def paginate(self, **asked: Any) -> Iterator[dict[str, Any]]:
        if self.error:
            raise self.error
        found = {key: data for key, data in self.objects.items() if key.startswith(asked["Prefix"])}
        yield {"Contents": [{"Key": k, "Size": len(d), "ETag": hashlib.md5(d).hexdigest()} for k, d in found.items()]}

    def get_object(self, **asked: Any) -> dict[str, Any]:
        self.opened.append(asked["Key"])
        return {"Body": BytesIO(self.objects[asked["Key"]][: self.cut_at])}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    made = Bucket({"loras/ink.safetensors": b"ink" * 10, "loras/neon.safetensors": b"neon" * 10})
    monkeypatch.setattr(fetch, "s3_client", lambda **_: made)
    return made


INK = AdapterUse("ink", "s3://bucket/loras/ink.safetensors")
NEON = AdapterUse("neon", "s3://bucket/loras", "neon.safetensors")


def kept(cache: Path) -> set[bytes]:
    return {path.read_bytes() for path in (cache / "adapters").glob("*.safetensors")}


def test_a_file_in_s3_comes_once_and_again_when_it_was_changed(bucket: Bucket, tmp_path: Path) -> None:
    first = fetch_file(INK, tmp_path)
    assert first.path.read_bytes() == b"ink" * 10
    assert fetch_file(INK, tmp_path) == first
    assert fetch_file(NEON, tmp_path).num_bytes == 40
    assert bucket.opened == ["loras/ink.safetensors", "loras/neon.safetensors"]
    bucket.objects["loras/ink.safetensors"] = b"new"
    assert fetch_file(INK, tmp_path).path.read_bytes() == b"new"


def test_a_file_whose_digest_is_known_needs_no_look_at_s3(bucket: Bucket, tmp_path: Path) -> None:
    first = fetch_file(INK, tmp_path)
    bucket.error = EndpointConnectionError(endpoint_url="http://away")
    assert fetch_file(AdapterUse("ink", INK.path, digest=first.digest), tmp_path) == first


def test_a_download_that_is_cut_leaves_everything_as_it_was(bucket: Bucket, tmp_path: Path) -> None:
    fetch_file(NEON, tmp_path)
    before = sorted(os.listdir(tmp_path / "adapters"))
    bucket.cut_at = 7
    with pytest.raises(StageUnavailableError, match="7 of 30 bytes came"):
        fetch_file(INK, tmp_path)
    assert sorted(os.listdir(tmp_path / "adapters")) == before
    bucket.cut_at = None
    assert fetch_file(INK, tmp_path).num_bytes == 30


def test_files_used_longest_ago_leave_the_disk_over_its_budget(bucket: Bucket, tmp_path: Path) -> None:
    bucket.objects |= {f"many/{index}.safetensors": bytes([index]) * 10 for index in range(5)}
    uses = [AdapterUse(str(i), f"s3://bucket/many/{i}.safetensors") for i in range(5)]
    for index, use in enumerate(uses[:3]):
        os.utime(fetch_file(use, tmp_path, 30).path, ns=(index, index))
    os.utime(fetch_file(uses[0], tmp_path, 30).path, ns=(9, 9))  # used again
    fetch_file(uses[3], tmp_path, 30)
    assert kept(tmp_path) == {bytes([index]) * 10 for index in (0, 2, 3)}


def of_code(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "secret"}}, "ListObjectsV2")


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (of_code("NoSuchBucket"), InvalidRequestError, "the bucket does not exist"),
        (of_code("AccessDenied"), InvalidRequestError, "the credentials may not read it"),
        (NoCredentialsError(), InvalidRequestError, "no credentials were found"),
        (of_code("SlowDown"), StageUnavailableError, "the server answers SlowDown"),
        (EndpointConnectionError(endpoint_url="http://away"), StageUnavailableError, "its place cannot be reached"),
    ],
)
def test_what_is_wrong_with_s3_is_named_and_where_it_is_is_not(
    error: Exception, expected: type[Exception], says: str, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.error = error
    with pytest.raises(expected, match=says) as caught:
        fetch_file(INK, tmp_path)
    assert not any(place in str(caught.value) for place in ("bucket/loras", "away"))


def test_an_object_that_is_not_there_is_the_configurations_fault(bucket: Bucket, tmp_path: Path) -> None:
    assert "there is no such object" in refused(AdapterUse("x", "s3://bucket/loras/x.safetensors"), tmp_path)
    assert "no file x.safetensors" in refused(AdapterUse("x", "s3://bucket/loras/", "x.safetensors"), tmp_path)


def test_a_repository_of_the_hub_is_read_by_its_own_library(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: Callable[..., Path] = lambda *_, **__: place  # noqa: E731
    monkeypatch.setattr(fetch, "pull_from_hub", brought)
    monkeypatch.setattr(fetch, "hub_files", lambda *_: ["neon.safetensors", "sub/x.safetensors", "README.md"])
    monkeypatch.setattr(fetch, "resolve_files", lambda _, names, *__, **___: [place / name for name in names])
    assert fetch_file(AdapterUse("neon", "artist/neon"), tmp_path).path == place / "neon.safetensors"
