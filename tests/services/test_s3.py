"""The storage in a bucket, against a real S3 server; what it stored is read by other means."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from deployments.errors import StorageError
from env_config.variables import CloudStorage
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.s3 import S3Storage
from tests.support.s3_server import S3Server, free_ports, s3_server
from tests.support.stored_files import DATA, KEY


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> str:
    return server.create_bucket("images")


@contextmanager
def opened(cloud: CloudStorage, **options) -> Iterator[S3Storage]:
    with closing(S3Storage(cloud, **options)) as storage:
        yield storage


def read_url(url: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read(), answer.headers["Content-Type"]


def status_of(url: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        read_url(url)
    with caught.value as answer:
        return answer.status


async def test_an_s3_object_has_its_type_its_checksum_and_its_metadata(server, bucket):
    with opened(server.cloud_storage(bucket)) as storage:
        stored = await storage.store(KEY, DATA, "image/png", {"seed": "7", "prompt": "100 % Füchse\n"})

    with closing(server.client()) as client:
        answer = client.get_object(Bucket=bucket, Key=KEY)
        head = client.head_object(Bucket=bucket, Key=KEY, ChecksumMode="ENABLED")
        assert answer["Body"].read() == DATA
    assert answer["ContentType"] == "image/png"
    assert answer["Metadata"] == {"seed": "7", "prompt": "100 %25 F%C3%BCchse%0A"}
    assert stored.sha256 == hashlib.sha256(DATA).hexdigest()
    assert base64.b64decode(head["ChecksumSHA256"]).hex() == stored.sha256


async def test_an_s3_object_is_loaded_and_deleted(server, bucket):
    with opened(server.cloud_storage(bucket)) as storage:
        await storage.store(KEY, DATA, "image/webp", {})
        assert await storage.load(KEY) == (DATA, "image/webp")
        await storage.delete(KEY)
        with pytest.raises(ObjectNotFoundError):
            await storage.load(KEY)


async def test_a_presigned_url_reads_a_private_bucket_for_its_lifetime_only(server, bucket):
    with opened(server.cloud_storage(bucket), url_lifetime_s=120) as storage:
        stored = await storage.store(KEY, DATA, "image/png", {})
    assert read_url(stored.url) == (DATA, "image/png")
    assert parse_qs(urlsplit(stored.url).query)["X-Amz-Expires"] == ["120"]
    assert server.secret_key not in stored.url
    assert status_of(stored.url.split("?")[0]) == 403
    assert status_of(stored.url.replace("X-Amz-Expires=120", "X-Amz-Expires=999")) == 403


async def test_a_public_url_reads_a_bucket_that_anyone_may_read(server):
    bucket = server.create_bucket("public-images")
    allow = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    with closing(server.client()) as client:
        client.put_bucket_policy(
            Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [allow]})
        )
    with opened(server.cloud_storage(bucket), url_style="public") as storage:
        stored = await storage.store(KEY, DATA, "image/png", {})
    assert stored.url == f"{server.endpoint}/{bucket}/{KEY}"
    assert read_url(stored.url) == (DATA, "image/png")


async def test_a_path_url_leads_through_this_server(server, bucket):
    with opened(server.cloud_storage(bucket), url_style="path", base_url="https://x.example") as storage:
        stored = await storage.store(KEY, DATA, "image/png", {})
    assert stored.url == f"https://x.example/v1/files/{KEY}"


def test_a_public_url_of_aws_has_the_bucket_and_the_region_in_its_host():
    cloud = CloudStorage(type="s3", bucket_name="b", region_name="eu-west-1")
    with opened(cloud, url_style="public") as storage:
        assert storage._public_url("k") == "https://b.s3.eu-west-1.amazonaws.com/k"


async def test_the_check_of_a_bucket_leaves_nothing_behind(server):
    bucket = server.create_bucket("checked")
    with opened(server.cloud_storage(bucket)) as storage:
        await storage.check()
    with closing(server.client()) as client:
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bucket_name": "missing"}, "no bucket SGLANG_S3_BUCKET_NAME='missing'"),
        ({"bucket_name": "Not A Bucket"}, "SGLANG_S3_BUCKET_NAME='Not A Bucket'"),
        ({"secret_access_key": "hunter2-hunter2"}, "SGLANG_S3_SECRET_ACCESS_KEY is not the secret"),
        ({"access_key_id": "nobody-hunter2"}, "does not know the key in SGLANG_S3_ACCESS_KEY_ID"),
        (
            {"access_key_id": "test-reader", "secret_access_key": "test-reader-secret"},
            "does not allow this to the key in SGLANG_S3_ACCESS_KEY_ID",
        ),
    ],
)
async def test_the_check_names_the_variable_that_is_wrong_and_no_secret(server, bucket, changes, says):
    with (
        opened(server.cloud_storage(bucket, **changes)) as storage,
        pytest.raises(StorageError, match=says) as caught,
    ):
        await storage.check()
    for secret in (server.secret_key, server.access_key, "hunter2", "test-reader"):
        assert secret not in str(caught.value)


async def test_a_server_that_is_not_there_is_named_without_its_password(server, bucket):
    [port] = free_ports(1)
    cloud = server.cloud_storage(bucket).model_copy(
        update={"endpoint_url": f"http://user:hunter2@127.0.0.1:{port}"}
    )
    with (
        opened(cloud, attempts=1) as storage,
        pytest.raises(StorageError, match=f"http://127.0.0.1:{port} .SGLANG_S3_ENDPOINT_URL.") as caught,
    ):
        await storage.check()
    assert "hunter2" not in str(caught.value)


async def test_unset_keys_are_left_to_botos_own_chain(server, bucket, monkeypatch):
    cloud = server.cloud_storage(bucket, access_key_id=None, secret_access_key=None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    with opened(cloud) as storage:
        await storage.check()


async def test_no_credentials_at_all_names_both_variables(server, bucket, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    cloud = server.cloud_storage(bucket, access_key_id=None, secret_access_key=None)
    with (
        opened(cloud) as storage,
        pytest.raises(StorageError, match=r"SGLANG_S3_ACCESS_KEY_ID and SGLANG_S3_SECRET_ACCESS_KEY"),
    ):
        await storage.check()


@contextmanager
def unreliable_s3(failures: int) -> Iterator[tuple[str, list[bytes]]]:
    """An S3 server that answers the first `failures` uploads with 503, and the bodies that it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(503 if len(bodies) <= failures else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", bodies
        http.shutdown()
        thread.join()


def cloud_at(endpoint: str) -> CloudStorage:
    return CloudStorage(
        type="s3", bucket_name="b", endpoint_url=endpoint, access_key_id="a", secret_access_key="s"
    )


async def test_an_upload_that_fails_is_tried_again():
    with unreliable_s3(failures=1) as (endpoint, bodies), opened(cloud_at(endpoint)) as storage:
        stored = await storage.store(KEY, DATA, "image/png", {})
    assert bodies == [DATA, DATA]
    assert stored.num_bytes == len(DATA)


async def test_an_upload_that_keeps_failing_ends_after_the_given_attempts():
    with (
        unreliable_s3(failures=100) as (endpoint, bodies),
        opened(cloud_at(endpoint), attempts=2) as storage,
        pytest.raises(StorageError, match="answered"),
    ):
        await storage.store(KEY, DATA, "image/png", {})
    assert len(bodies) == 2


def test_the_settings_of_a_storage_show_no_secret(server, bucket):
    with opened(server.cloud_storage(bucket)) as storage:
        assert server.secret_key not in repr(storage.cloud)
        assert server.secret_key not in str(vars(storage))
