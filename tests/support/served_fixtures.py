"""What the tests of served behaviour share: checkpoints, an S3 server, one Ray with the first application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.support.s3_server import S3Server, s3_server
from tests.support.served_application import (
    CHECKPOINT_EVERY,
    THREE_STAGE,
    ServedApplication,
    application,
    launched_application,
)

BUCKET = "outputs"


@pytest.fixture(scope="session")
def flux_checkpoint(checkpoints_root: Path) -> Path:
    from tests.support.tiny_models import checkpoint  # it imports torch, which not every stress test needs

    return checkpoint("flux", checkpoints_root)


@pytest.fixture(scope="session")
def served(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    """A tiny FLUX in three stages at /; a test that ends a replica waits until all are healthy again."""
    with launched_application(flux_checkpoint, tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server with the bucket BUCKET."""
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield server


def s3_variables(server: S3Server, bucket: str = BUCKET) -> dict[str, str]:
    """The environment of an application that stores there."""
    return {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": bucket,
        "SGLANG_S3_ENDPOINT_URL": server.endpoint,
        "SGLANG_S3_ACCESS_KEY_ID": server.access_key,
        "SGLANG_S3_SECRET_ACCESS_KEY": server.secret_key,
    }


@pytest.fixture(scope="package")
def wan(served: ServedApplication, checkpoints_root: Path, s3: S3Server) -> Iterator[ServedApplication]:
    """A tiny Wan 2.2 in three stages that stores in S3, at /wan."""
    from tests.support.tiny_models import checkpoint

    app = application(
        "wan",
        checkpoint("wan22", checkpoints_root),
        THREE_STAGE,
        served.folder,
        s3_variables(s3),
        denoising={"checkpoint_every": CHECKPOINT_EVERY},
        public_url=f"{served.url}/wan",
        url_style="path",
        jobs={"lease_s": 5},
    )
    with served.beside(app):
        served.wait_until_healthy("/wan")
        yield served


@pytest.fixture(scope="module")
def metrics_port(served: ServedApplication) -> Iterator[int]:
    """This process as a driver of the same Ray; the port where Prometheus would ask for the metrics."""
    ray.init(address=served.ray_address(), log_to_driver=False)
    try:
        [node] = ray.nodes()
        yield node["MetricsExportPort"]
    finally:
        ray.shutdown()
