"""A modular pipeline over HTTP: the picture is the unsplit one's, from words and from a picture."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.model_in_process import ModelServer, model_served
from tests.support.tiny_models import checkpoint, run_unsplit
from tests.support.tiny_models.pictures import noise_image

pytestmark = pytest.mark.filterwarnings("default")

NAME = "modular_zimage"
ASKED = {"prompt": "a small cat", "num_inference_steps": 3, "guidance_scale": 3.0}
GUIDED = {"enabled": True}  # of the guider, which this model switches off
SEED = 7


@pytest.fixture(scope="module")
def server(checkpoints_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with model_served(checkpoint(NAME, checkpoints_root), tmp_path_factory.mktemp("modular") / "outputs") as server:
        yield server


def test_a_picture_from_words_has_the_pixels_of_the_unsplit_pipeline(
    server: ModelServer, checkpoints_root: Path
) -> None:
    body = {**ASKED, "extra_args": GUIDED, "seed": SEED, "size": "32x32", "response_format": "b64_json"}
    answer = server.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()), unsplit(checkpoints_root, height=32, width=32))


@pytest.mark.rest
def test_a_picture_from_a_picture_has_the_pixels_of_the_unsplit_pipeline(
    server: ModelServer, checkpoints_root: Path
) -> None:
    given = noise_image(32)
    file = io.BytesIO()
    given.save(file, "PNG")
    form = {
        **{name: str(value) for name, value in ASKED.items()},
        "seed": str(SEED),
        "strength": "0.9",
        "size": "32x32",
    }
    form["extra_args"] = json.dumps(GUIDED)
    answer = server.post(
        "/v1/images/edits", data=form | {"response_format": "b64_json"}, files={"image": ("a.png", file.getvalue())}
    )
    assert answer.status_code == 200, answer.text
    assert np.array_equal(
        pixels(answer.json()), unsplit(checkpoints_root, image=given, strength=0.9, height=32, width=32)
    )


def test_an_argument_that_no_block_and_no_guider_takes_is_refused(server: ModelServer) -> None:
    answer = server.post(
        "/v1/images/generations", json={**ASKED, "size": "32x32", "extra_args": {"guidance_rescale_2": 3.0}}
    )
    assert answer.status_code == 400, answer.text
    assert "guidance_rescale_2" in answer.json()["error"]["message"]


def pixels(body: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))))


def unsplit(checkpoints_root: Path, **arguments: Any) -> Any:
    [made] = run_unsplit(checkpoint(NAME, checkpoints_root), ASKED | GUIDED | arguments, SEED)
    return (made[0] * 255).round().numpy().astype("uint8").transpose(1, 2, 0)
