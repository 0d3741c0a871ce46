"""Other applications beside the first: placements, storage in S3, video, and those that cannot start."""

import base64
import io
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.s3_server import S3Server, s3_server
from tests.serve_app.served_application import ServedApplication, application, picture_of
from tests.serve_app.unsplit import unsplit_picture, unsplit_video
from tests.tiny_models import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "a small cat"
TWO_STAGE = ("EncoderVAE", "Denoiser")
ONE_STAGE = ("Pipeline",)
BUCKET = "pictures"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def placements(served: ServedApplication, flux_checkpoint: Path, s3: S3Server) -> Iterator[ServedApplication]:
    """The same model as the first application's, in two stages, and in one stage that stores in S3."""
    two_stage = application("two_stage", flux_checkpoint, TWO_STAGE, served.folder, placement="two_stage")
    one_stage = application(
        "one_stage", flux_checkpoint, ONE_STAGE, served.folder, placement="one_stage", env_vars=s3_variables(s3, BUCKET)
    )
    with beside_the_first(served, two_stage, one_stage):
        yield served
