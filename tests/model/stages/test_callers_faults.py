"""Requests that a pipeline's own code cannot make are refused with the argument, in every stage and placement."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, OutputFormat
from tests.support.further import all_but
from tests.support.hostile_requests import attack, data_url
from tests.support.model_in_process import ModelServer, model_served
from tests.support.tiny_models import checkpoint

# What diffusers, torch and numpy say of arguments without sense.
pytestmark = pytest.mark.filterwarnings("default")

CASES = 25  # of each model; thousands in tests/fuzz
PICTURE, WHITE = data_url(32, 32), data_url(32, 32, "white")
PLACEMENT = {"flux": "three_stage", "sd15_inpaint": "two_stage", "sd15": "one_stage"}
GOOD: dict[str, dict[str, Any]] = {
    "flux": {"size": "32x32", "num_inference_steps": 1, "max_sequence_length": 16},
    "sd15_inpaint": {"size": "32x32", "num_inference_steps": 2, "image": PICTURE, "mask_image": WHITE},
    "sd15": {"size": "32x32", "num_inference_steps": 1},
}
# The first is refused before any request was made: a default one is tried.
FAULTS: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "flux": [
        ({"extra_args": {"joint_attention_kwargs": {"ip_adapter_image_embeds": [1]}}}, "joint_attention_kwargs"),
        ({"extra_args": {"sigmas": []}}, "sigmas"),
        ({"extra_args": {"prompt_2": ["a", "b"]}}, "prompt_2"),
        ({"deadline_s": 1e-300}, "deadline_s"),
    ],
    "sd15_inpaint": [
        ({"mask_image": None, "num_inference_steps": 3}, "mask"),
        ({"image": [PICTURE, PICTURE], "mask_image": WHITE}, None),
        ({"strength": 0.1}, "strength"),
        ({"strength": 0.0}, "strength"),
    ],
    "sd15": [
        ({"extra_args": {"clip_skip": 99}}, "clip_skip"),
        ({"extra_args": {"timesteps": []}}, "timesteps"),
        ({"extra_args": {"clip_skip": -99}}, "clip_skip"),
    ],
}


@pytest.fixture(scope="module", params=all_but(["flux"], PLACEMENT))
def server(
    request: pytest.FixtureRequest, checkpoints_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelServer]:
    folder = checkpoint(request.param, checkpoints_root)
    outputs = tmp_path_factory.mktemp(request.param) / "outputs"
    with model_served(folder, outputs, PLACEMENT[request.param]) as running:
        yield running


def asked(server: ModelServer, **changes: Any) -> Any:
    name = server.model.name
    body = {"prompt": "a fox", "seed": 1, **GOOD[name], **changes}
    if "sigmas" in changes.get("extra_args", {}):  # beside them steps have no effect
        del body["num_inference_steps"]
    path = "/v1/images/edits" if "image" in GOOD[name] else "/v1/images/generations"
    return server.post(path, json={field: value for field, value in body.items() if value is not None})


def test_a_request_that_cannot_be_made_is_refused_with_its_argument(server: ModelServer) -> None:
    for changes, param in FAULTS[server.model.name]:
        answer = asked(server, **changes)
        assert answer.status_code == 400, (changes, answer.text)
        error = answer.json()["error"]
        if param is not None:
            assert error["param"] == param, error
        assert "/" not in error["message"]  # no path of the server
    made = asked(server)
    assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")


def test_numbers_that_are_none_are_the_fault_of_a_value_beyond_sense_and_change_nothing_for_others(
    server: ModelServer,
) -> None:
    arguments = {"prompt": "a fox", "num_inference_steps": 1, "width": 32, "height": 32, "guidance_scale": 3e38}
    if server.model.name == "flux":
        arguments |= {"true_cfg_scale": 3e38, "negative_prompt": "x"}
    if server.model.name == "sd15_inpaint":
        return  # begins with a picture
    request = GenerationRequest("r", "m", arguments, 0, OutputFormat("image", "png"))
    with pytest.raises(InvalidRequestError, match="not numbers"):
        server.make(request)
    assert server.model.stages.hand_off_of(request) == "first"


def test_hostile_requests_find_no_failure_of_the_server(server: ModelServer) -> None:
    found = attack(server, CASES, derandomize=True)
    assert found.is_clean, "\n".join([*found.server_errors, *found.unclear])
    assert found.statuses[200] >= 1
    assert found.statuses[400] >= 3
