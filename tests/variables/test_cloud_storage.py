"""The six variables under "Cloud Storage", against a real S3 server: changed, the files go elsewhere or nowhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from deployments.errors import StorageError
from env_config.section import EnvConfigError
from env_config.variables import EnvConfig
from serve_app.storage.base import StorageBackend
from serve_app.storage.s3 import S3Storage
from serve_app.storage.table import make_storage
from tests.support.proofs import proof
from tests.support.s3_server import S3Server, s3_server

KEY = "images/2026/11/21/cat-0.png"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.create_bucket("one")
        running.create_bucket("two")
        yield running


def variables(server: S3Server, **changes: str) -> dict[str, str]:
    return {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": "one",
        "SGLANG_S3_ENDPOINT_URL": server.endpoint,
        "SGLANG_S3_ACCESS_KEY_ID": server.access_key,
        "SGLANG_S3_SECRET_ACCESS_KEY": server.secret_key,
    } | changes


def storage(environ: dict[str, str], folder: Path) -> StorageBackend:
    return make_storage(EnvConfig.from_environ(environ).cloud_storage, folder)


async def store(environ: dict[str, str], folder: Path) -> str:
    """The URL of a stored file."""
    backend = storage(environ, folder)
    stored = await backend.store(KEY, b"picture", "image/png", {})
    if isinstance(backend, S3Storage):
        backend.close()
    return stored.url


def keys(server: S3Server, bucket: str) -> list[str]:
    with closing(server.client()) as client:
        keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
        for key in keys:
            client.delete_object(Bucket=bucket, Key=key)
    return keys


@proof("real S3 server (SeaweedFS)")
async def test_sglang_cloud_storage_type_sends_files_to_s3(server: S3Server, tmp_path: Path) -> None:
    unset = variables(server)
    del unset["SGLANG_CLOUD_STORAGE_TYPE"]
    url = await store(unset, tmp_path)
    assert (keys(server, "one"), (tmp_path / KEY).read_bytes(), url) == ([], b"picture", f"/v1/files/{KEY}")
    other_folder = tmp_path / "other"
    url = await store(variables(server), other_folder)
    assert keys(server, "one") == [KEY]
    assert not other_folder.exists()
    assert url.startswith(server.endpoint)


@proof("real S3 server (SeaweedFS)")
async def test_sglang_s3_bucket_name_is_the_bucket(server: S3Server, tmp_path: Path) -> None:
    await store(variables(server, SGLANG_S3_BUCKET_NAME="two"), tmp_path)
    assert (keys(server, "one"), keys(server, "two")) == ([], [KEY])
    with pytest.raises(EnvConfigError, match="SGLANG_S3_BUCKET_NAME is not set: must be set when"):
        storage(variables(server, SGLANG_S3_BUCKET_NAME=""), tmp_path)


@proof("real S3 server (SeaweedFS)")
async def test_sglang_s3_endpoint_url_is_the_server(server: S3Server, tmp_path: Path) -> None:
    assert (await store(variables(server), tmp_path)).startswith(server.endpoint)
    with s3_server() as other:
        other.create_bucket("one")
        url = await store(variables(server, SGLANG_S3_ENDPOINT_URL=other.endpoint), tmp_path)
        assert url.startswith(other.endpoint)
        assert keys(other, "one") == [KEY]
    assert keys(server, "one") == [KEY]


@proof("real S3 server (SeaweedFS)")
async def test_sglang_s3_region_name_is_in_the_signature(server: S3Server, tmp_path: Path) -> None:
    for region in ("us-east-1", "eu-west-1"):
        url = await store(variables(server, SGLANG_S3_REGION_NAME=region), tmp_path)
        [credential] = parse_qs(urlsplit(url).query)["X-Amz-Credential"]
        assert credential.split("/")[2] == region


@proof("real S3 server (SeaweedFS)")
async def test_sglang_s3_access_key_id_is_who_asks(server: S3Server, tmp_path: Path) -> None:
    reader = {
        "SGLANG_S3_ACCESS_KEY_ID": server.reader_access_key,
        "SGLANG_S3_SECRET_ACCESS_KEY": server.reader_secret_key,
    }
    with pytest.raises(StorageError, match="does not allow this to the key in SGLANG_S3_ACCESS_KEY_ID"):
        await storage(variables(server, **reader), tmp_path).check()
    url = await store(variables(server), tmp_path)
    [credential] = parse_qs(urlsplit(url).query)["X-Amz-Credential"]
    assert credential.split("/")[0] == server.access_key


@proof("real S3 server (SeaweedFS)")
async def test_sglang_s3_secret_access_key_proves_who_asks(server: S3Server, tmp_path: Path) -> None:
    wrong = base64.b64encode(b"not the secret").decode()
    await storage(variables(server), tmp_path).check()
    with pytest.raises(StorageError, match="SGLANG_S3_SECRET_ACCESS_KEY is not the secret") as refusal:
        await storage(variables(server, SGLANG_S3_SECRET_ACCESS_KEY=wrong), tmp_path).check()
    assert wrong not in str(refusal.value)
