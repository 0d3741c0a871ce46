"""What an argument is sent as, told by annotation, name and docstring, also where one of them is wrong or missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.messages import ValueType
from deployments.stage_pipeline.inputs.docstrings import parameter_docs
from deployments.stage_pipeline.inputs.fields import argument_fields
from deployments.stage_pipeline.inputs.kinds import WHY_CALL, WHY_CODE, WHY_PATH
from deployments.stage_pipeline.inputs.values import Waveform, as_pipeline_takes

Pictures = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class Condition:
    image: Image.Image | None = None
    video: list[Image.Image] | None = None
    frame_index: int = 0
    mode: Mode = Mode.FAST


class Pipeline:
    def __call__(
        self,
        control_image: Pictures = None,  # type: ignore[assignment]
        style_image: Pictures | None = None,
        input_images: Pictures = None,  # type: ignore[assignment]
        clips: list[list[Pictures]] | None = None,
        pose_frames: list[Pictures] | None = None,
        hint: torch.Tensor | None = None,
        control_video: torch.FloatTensor | None = None,
        video_by_channel: torch.Tensor | None = None,
        end_image: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        latent_mask: torch.Tensor | None = None,
        voice_audio: torch.Tensor | None = None,
        audio_sampling_rate: torch.Tensor | None = None,
        sound_list: list[torch.Tensor] | None = None,
        untold=None,  # type: ignore[no-untyped-def]
        strength: float = 0.5,
        num_frames: int = 9,
        mode: Mode = Mode.FAST,
        conditions: Condition | list[Condition] | None = None,
        class_labels: torch.Tensor | list[int] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        masked_image_latents: Pictures | None = None,
        poses: torch.Tensor | None = None,
        image_token_ids: list[torch.Tensor] | None = None,
        sigmas: list[float | torch.Tensor] | None = None,
        clip_video: list | torch.Tensor | None = None,  # type: ignore[type-arg]
        callback: Callable[[int], None] | None = None,
        font_file: str | None = None,
        fonts: list[str] | None = None,
    ) -> Any:
        """Makes something.

        Args:
            control_image (`PIL.Image.Image` or `list[PIL.Image.Image]`, or
                `list[list[PIL.Image.Image]]`):
                The picture that [steers](https://example.com).
            input_images (`PipelineImageInput`, *optional*):
                Pictures of the prompt.
            control_video (`torch.Tensor`, *optional*): Frames.
            video_by_channel (`torch.Tensor`, *optional*): Frames of shape `(B, T, C, H, W)` in `[0, 1]`.
            latent_mask (`torch.Tensor`, *optional*): A latent mask ``(batch, 1, L)`` with 0 = keep.
            voice_audio (`torch.Tensor`, *optional*): A waveform of shape `(batch_size, num_channels, audio_length)`.
            audio_sampling_rate (`int`, *optional*): Of `voice_audio`.
            untold (`list[PIL.Image.Image]`, *optional*): Pictures.
            strength (`float`, *optional*, defaults to 0.5): Must be between 0 and 1. Higher is more.
            fonts (`list[str]`, *optional*): Paths of the fonts.

        Returns:
            nothing
        """
        end_image = self.video_processor.preprocess(end_image, height=1)  # type: ignore[attr-defined]


FIELDS = argument_fields(Pipeline)
PICTURE, VIDEO, SOUND, NONE = (ValueType(kind) for kind in ("picture", "video", "sound", "none"))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("control_image", {"picture", "tensor", "list"}),
        ("style_image", {"picture", "tensor", "list", "none"}),
        ("clips", {"list", "none"}),
        ("pose_frames", {"video", "none"}),
        ("hint", {"picture", "none"}),
        ("control_video", {"video", "none"}),
        ("end_image", {"picture", "none"}),
        ("region_mask", {"picture", "none"}),
        ("voice_audio", {"sound", "none"}),
        ("audio_sampling_rate", {"int", "none"}),
        ("untold", {"picture", "list"}),
        ("mode", {"choice"}),
        ("conditions", {"record", "list", "none"}),
        ("class_labels", {"list", "none"}),
        ("num_frames", {"int"}),
        ("sigmas", {"list"}),
        ("clip_video", {"video"}),
    ],
)
def test_an_argument_has_a_kind(name: str, kinds: set[str]) -> None:
    assert {choice.kind for choice in FIELDS[name].type.choices_of()} - {"none"} == kinds - {"none"}
    assert FIELDS[name].notes.why_not == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("latent_mask", WHY_CODE),
        ("prompt_embeds", WHY_CODE),
        ("masked_image_latents", WHY_CODE),
        ("poses", WHY_CODE),
        ("image_token_ids", WHY_CODE),
        ("callback", WHY_CALL),
        ("font_file", WHY_PATH),
        ("fonts", WHY_PATH),
    ],
)
def test_what_cannot_be_sent_says_why(name: str, why: str) -> None:
    assert FIELDS[name].notes.why_not == why


def test_a_picture_is_needed_where_neither_annotation_nor_docstring_let_it_be_left_out() -> None:
    assert [name for name, field in FIELDS.items() if field.is_needed] == ["control_image"]


def test_default_bounds_and_description_come_along() -> None:
    notes = FIELDS["strength"].notes
    assert (notes.default, notes.minimum, notes.maximum) == (0.5, 0.0, 1.0)
    assert notes.description == "Must be between 0 and 1. Higher is more."
    assert FIELDS["control_image"].notes.description == "The picture that steers."


def test_a_docstring_without_entries_says_nothing() -> None:
    assert parameter_docs(None, ["x"]) == {}
    assert parameter_docs("x (`int", ["x"])["x"].text == ""


def test_pictures_become_tensors_only_where_the_code_takes_nothing_else() -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    assert as_pipeline_takes(Pipeline, "end_image", picture) is picture
    assert as_pipeline_takes(Pipeline, "control_image", [picture, None]) == [picture, None]
    hint = as_pipeline_takes(Pipeline, "hint", picture)
    assert (hint.shape, hint[0, :, 0, 0].tolist()) == ((1, 3, 2, 4), [1.0, 0.0, 0.0])
    assert as_pipeline_takes(Pipeline, "region_mask", picture).shape == (1, 1, 2, 4)
    assert as_pipeline_takes(Pipeline, "control_video", [picture] * 5).shape == (1, 3, 5, 2, 4)
    assert as_pipeline_takes(Pipeline, "video_by_channel", [picture] * 5).shape == (1, 5, 3, 2, 4)


def test_a_sound_becomes_a_tensor_of_the_dimensions_that_are_told() -> None:
    samples = np.arange(6, dtype=np.float32).reshape(2, 3)
    told = as_pipeline_takes(Pipeline, "voice_audio", Waveform(samples))
    assert torch.equal(told, torch.from_numpy(samples)[None])
    [untold] = as_pipeline_takes(Pipeline, "sound_list", [Waveform(samples)])
    assert torch.equal(untold, torch.from_numpy(samples))


def test_objects_and_choices_become_the_classes_of_the_annotation() -> None:
    picture = Image.new("RGB", (4, 2))
    made = as_pipeline_takes(Pipeline, "conditions", [{"image": picture, "frame_index": 8, "mode": "slow"}])
    assert made == [Condition(picture, None, 8, Mode.SLOW)]
    assert as_pipeline_takes(Pipeline, "mode", "slow") is Mode.SLOW
