"""Where LoRAs may be loaded from: nothing that a caller says leads out of the places."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.errors import InvalidRequestError
from serve_app.adapters.places import check_place, find, lies_in
from serve_app.service import ServiceArgs


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A folder with a LoRA, a folder of two, and links that lead out of it; beside it, what nobody may read."""
    folder = tmp_path / "loras"
    for file in ("a.safetensors", "one/only.safetensors", "two/x.safetensors", "two/y.safetensors", "note.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    for outside in ("secret.safetensors", "loras-private/b.safetensors"):
        (tmp_path / outside).parent.mkdir(exist_ok=True)
        (tmp_path / outside).touch()
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "linked").symlink_to(tmp_path / "loras-private")
    (folder / "half").mkdir()
    (folder / "half" / "c.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "inner.safetensors").symlink_to(folder / "a.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("path", "weight_name", "found"),
    [
        ("a.safetensors", None, "a.safetensors"),
        ("./a.safetensors", None, "a.safetensors"),
        ("{place}/a.safetensors", None, "a.safetensors"),
        ("{place}/one", None, "one/only.safetensors"),
        ("one/", None, "one/only.safetensors"),
        ("two", "y.safetensors", "two/y.safetensors"),
        ("inner.safetensors", None, "inner.safetensors"),
    ],
)
def test_a_file_inside_of_a_place_is_found(place: str, path: str, weight_name: str | None, found: str) -> None:
    assert find(path.format(place=place), weight_name, [place]) == os.path.join(place, found)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors", "one/../../secret.safetensors", "{place}/../secret.safetensors", "{outside}",
        "{place}-private/b.safetensors", "link.safetensors", "linked/b.safetensors", "linked", "half",
        "half/c.safetensors", "{place}/link.safetensors", "/", "", ".", "..", "~/a.safetensors", "~root",
        "missing.safetensors", "note.txt", "one//only.safetensors", "./one/./only.safetensors", "a.safetensors\0",
        "a.safetensors\n", "one\\only.safetensors", "\ud800", "x" * 5000, "file:///etc/passwd",
        "file://{place}/a.safetensors", "http://127.0.0.1/a.safetensors", "https://x/a.safetensors", "hf://o/r",
        "S3://bucket/a", "s3:/bucket/a", "s3://other/loras/x", "s3://bucket/loras-private/x", "s3://bucket",
        "s3://bucket/loras/../x", "s3://bucket/loras//x", "s3:///bucket/loras/x", "s3://./bucket/loras/x", "s3://",
        "stranger/lora", "owner/lora/more", "owner", "owner/..", "оwner/lora", "maker/other",
        "%2e%2e/secret.safetensors", "{place}/%2e%2e/secret.safetensors", "//{place}/a.safetensors",
    ],
)  # fmt: skip
def test_what_leads_elsewhere_is_refused_and_the_refusal_tells_nothing(place: str, path: str) -> None:
    places = [place, "s3://bucket/loras", "owner", "maker/one"]
    path = path.format(place=place, outside=Path(place).parent / "secret.safetensors")
    with pytest.raises(InvalidRequestError) as refused:
        find(path, None, places)
    assert refused.value.message == "path: there is no such LoRA in the places that this server allows"


def test_a_weight_name_that_leads_out_is_refused(place: str) -> None:
    with pytest.raises(InvalidRequestError, match="no such LoRA"):
        find("half", "c.safetensors", [place])
    with pytest.raises(InvalidRequestError, match="weight_name is required: 2 files"):
        find("two", None, [place])


@pytest.mark.parametrize("path", ["s3://bucket/loras/x", "s3://bucket/loras/a/b.safetensors", "owner/any", "maker/one"])
def test_what_lies_in_s3_or_on_the_hub_is_taken_by_its_prefix(path: str) -> None:
    places = ["s3://bucket/loras", "owner", "maker/one"]
    assert find(path, None, places) == path
    assert lies_in(path, places)
    assert not lies_in(path, ["/owner", "s3://maker/one", "./owner"])


@pytest.mark.parametrize("place", ["/srv/loras/", "./loras", "s3://bucket", "s3://bucket/a/b", "owner", "owner/repo"])
def test_folders_prefixes_and_owners_are_places(place: str) -> None:
    assert check_place(place) == place.rstrip("/")


@pytest.mark.parametrize(
    "place",
    ["", "/", "//", ".", "./", "..", "../loras", "/srv/../etc", "~", "~/loras", "/etc", "/tmp/", "/proc/self", "/dev/x",
     "s3://", "s3://A_B/x", "s3://bucket//x", "s3://bucket/../x", "http://host/x", "owner/repo/file", "*", "a b", "о"],
)  # fmt: skip
def test_a_place_that_is_none_or_too_wide_is_refused_by_name(place: str) -> None:
    with pytest.raises(ValidationError, match="adapter_places"):
        ServiceArgs(adapter_places=(place,))
