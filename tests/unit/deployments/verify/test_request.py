"""The request of a check is the smallest that a call's signature allows, with what it needs drawn."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import InputImage, Task
from deployments.model import ModelArgs
from deployments.stage_pipeline.description import call_parameters
from deployments.verify.asked import Asked
from deployments.verify.request import in_words, small_requests
from tests.support.in_process import TEXT_TO_IMAGE


class Words:
    def __call__(self, prompt: str | None = None, width: int | None = None, num_inference_steps: int = 50) -> Any: ...


class Edits:
    def __call__(
        self,
        prompt: str,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
    ) -> Any: ...


class Controlled:
    def __call__(
        self,
        control_image: PipelineImageInput = None,
        reference: list[Image.Image] | None = None,
        image_guidance_scale: float = 1.0,
    ) -> Any: ...


class Moves:
    def __call__(
        self,
        video: list[Image.Image],
        mask_video: list[Image.Image],
        audio: torch.Tensor,
        class_labels: list[int],
        seconds: float,
        num_frames: int = 81,
    ) -> Any: ...


class Decodes:
    def __call__(self, image_embeds: torch.Tensor) -> Any: ...


def requests_of(
    pipeline_class: type, monkeypatch: pytest.MonkeyPatch, *tasks: Task, asked: Asked | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    parameters, required = call_parameters(pipeline_class)
    description = dataclasses.replace(
        TEXT_TO_IMAGE, pipeline_class="Toy", parameters=parameters, required=required, tasks=tasks
    )
    monkeypatch.setattr("deployments.verify.request.describe_stage", lambda whole: description)
    model = ModelArgs(path="toy", name="toy", default_arguments=defaults)
    whole: Any = SimpleNamespace(pipeline=pipeline_class())
    return [request.arguments for request in small_requests(whole, model, asked or Asked())]


def picture_in(value: Any) -> Image.Image:
    assert isinstance(value, InputImage)
    return Image.open(io.BytesIO(value.data))


def test_words_are_enough_where_the_call_takes_only_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = requests_of(Words, monkeypatch, "text_to_image", num_inference_steps=28)
    assert in_words(first) == {
        "num_inference_steps": "3",
        "prompt": "'a small red boat on a quiet lake'",
        "width": "128",  # eight times the model's own multiple
    }
    assert [sorted(other) for other in others] == [["num_inference_steps", "prompt"]]  # of its own size


def test_a_task_that_begins_with_a_picture_brings_one_and_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = requests_of(Edits, monkeypatch, "inpainting")
    assert set(first) == {"prompt", "image", "mask_image", "num_inference_steps", "strength"}
    assert (first["num_inference_steps"], first["strength"]) == (4, 0.8)
    assert picture_in(first["image"]).size == (128, 128)
    assert picture_in(first["mask_image"]).getextrema() == (0, 255)
    assert any("ip_adapter_image" in other for other in others)
    assert not any("ip_adapter_image_embeds" in other for other in others)


def test_pictures_that_a_signature_does_not_mark_come_after_those_that_it_requires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [set(arguments) for arguments in requests_of(Controlled, monkeypatch)]
    assert names[:3] == [set(), {"control_image"}, {"control_image", "reference"}]
    third = requests_of(Controlled, monkeypatch)[2]
    assert isinstance(third["control_image"], InputImage)
    assert [type(each) for each in third["reference"]] == [InputImage]


def test_videos_sounds_and_numbers_are_drawn_where_they_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    first = requests_of(Moves, monkeypatch)[0]
    assert in_words(first) == {
        "video": "9 pictures",
        "mask_video": "9 pictures",
        "audio": "a sound",
        "class_labels": "[1]",
        "seconds": "1",
        "num_frames": "9",
    }
    assert first["video"][0] != first["video"][1]
    assert first["audio"].shape == (2, 16_000)


def test_what_no_request_can_bring_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="its call needs image_embeds, which no request can bring"):
        requests_of(Decodes, monkeypatch)


def test_what_was_asked_for_counts_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (5, 7)).save(file)
    asked = Asked(prompt="b", width=64, height=32, steps=2, arguments={"image": f"@{file}", "strength": 0.5})
    [first, *_] = requests_of(Edits, monkeypatch, "inpainting", asked=asked, prompt="default")
    assert (first["prompt"], first["num_inference_steps"], first["strength"]) == ("b", 2, 0.5)
    assert picture_in(first["image"]).size == (5, 7)
    assert picture_in(first["mask_image"]).size == (64, 32)
