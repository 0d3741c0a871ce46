"""The request of a check: small, of few steps, with drawn pictures where the pipeline's call asks for some."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, InputImage, OutputFormat, StageDescription, ValueType
from deployments.model import ModelArgs
from deployments.stage_pipeline.argument_types import call_inputs, value_type
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline
from deployments.verify.asked import Asked

SMALL_SIDE = 8  # multiples of the model's own: some pixels of latents
FEW_STEPS = 3  # so that there is a checkpoint in the middle
FEW_FRAMES = 9  # 4 x 2 + 1 and 8 x 1 + 1: what the VAEs of videos can pack
PLAIN_SIDE = 512  # pixels of a picture where the model has no size of its own
MOST_OF_THE_STEPS = 0.8  # `strength`, of one step more
SAMPLE_RATE = 16_000  # of a drawn sound
PROMPT = "a small red boat on a quiet lake"
ANY_OUTPUT = OutputFormat("image", "png")  # what is compared comes before files are written

NO_PICTURES = frozenset({"embeds", "embeddings", "latents", "scale", "size", "strength", "attention", "index"})
PICTURES = frozenset({"image", "images", "mask", "masks", "video", "frames", "picture", "reference"})
VIDEOS = frozenset({"video", "frames"})
MASKS = frozenset({"mask", "masks"})
SOUNDS = frozenset({"audio", "sound", "waveform", "waveforms"})


def small_requests(whole: StagePipeline, model: ModelArgs, asked: Asked) -> Iterator[GenerationRequest]:
    """The cheapest first: small with what the call requires, with more pictures, then of the model's own size.

    Raises InvalidRequestError for an argument that the call does not take, or one that nobody can draw.
    """
    description, inputs = describe_stage(whole), call_inputs(type(whole.pipeline))
    given = {name: _file_or_value(value) for name, value in asked.arguments.items()}
    if asked.prompt is not None:
        given["prompt"] = asked.prompt
    if unknown := sorted(given.keys() - description.parameters.keys()):
        raise InvalidRequestError(f"{description.pipeline_class} does not take {', '.join(unknown)}")
    known = model.default_arguments | given
    seen: set[tuple[Any, ...]] = set()
    for sizes, width, height in _sizes(description, asked):
        for names in _inputs(description, inputs):
            wanted = [name for name in names if name not in known]
            drawn = {name: _drawn(name, inputs[name], width, height) for name in wanted}
            sized = {name: value for name, value in (sizes | _steps(description, asked)).items() if name in inputs}
            if (kind := (*wanted, *sized.items())) not in seen:
                seen.add(kind)
                arguments = model.default_arguments | drawn | sized | given
                yield GenerationRequest("verify", model.name, arguments, 0, ANY_OUTPUT, deterministic=True)


def in_words(arguments: dict[str, Any]) -> dict[str, str]:
    """The arguments as a report tells them."""
    return {name: _word(value) for name, value in arguments.items()}


def _sizes(description: StageDescription, asked: Asked) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Arguments of the size, and the width and height of pictures that go with them."""
    small = description.size_multiple * SMALL_SIDE
    width, height = asked.width or small, asked.height or small
    yield {"width": width, "height": height, "num_frames": FEW_FRAMES}, width, height
    if asked.width is None and asked.height is None:
        own = description.default_width or PLAIN_SIDE, description.default_height or PLAIN_SIDE
        yield {"num_frames": FEW_FRAMES}, *own
        yield {}, *own


def _steps(description: StageDescription, asked: Asked) -> dict[str, Any]:
    strength = isinstance(description.parameters.get("strength"), float)
    steps = {"num_inference_steps": asked.steps or FEW_STEPS + strength}
    return steps | ({"strength": MOST_OF_THE_STEPS} if strength else {})


def _inputs(description: StageDescription, inputs: dict[str, inspect.Parameter]) -> Iterator[list[str]]:
    """Names of arguments to bring: what is required; pictures that may not be None; all pictures; an adapter's too."""
    required = [name for name in inputs if name in {"prompt", *description.required, *_of_tasks(description)}]
    pictures = [name for name, parameter in inputs.items() if _medium(name, parameter) in ("picture", "mask", "video")]
    unmarked = [name for name in pictures if inputs[name].default is None and not _admits_none(inputs[name])]
    plain = [name for name in pictures if not name.startswith("ip_adapter")]
    for more in ([], unmarked, plain, pictures):
        yield list(dict.fromkeys([*required, *more]))


def _of_tasks(description: StageDescription) -> set[str]:
    tasks, needed = set(description.tasks), set()
    if description.needs_picture:
        needed |= {"image", "mask_image"} if "inpainting" in tasks else {"image"}
    return needed | ({"video"} if tasks == {"video_to_video"} else set())


def _admits_none(parameter: inspect.Parameter) -> bool:
    return "none" in _kinds(value_type(parameter.annotation))


def _medium(name: str, parameter: inspect.Parameter) -> str | None:
    """picture, mask, video or sound; None for what is no medium."""
    words = set(name.split("_"))
    kinds = _kinds(value_type(parameter.annotation))
    if words & NO_PICTURES or not kinds & {"picture", "any", "tensor", "object"}:
        return None
    if words & SOUNDS:
        return "sound"
    if not words & PICTURES and "picture" not in kinds:
        return None
    if words & VIDEOS:
        return "video"
    return "mask" if words & MASKS else "picture"


def _kinds(wanted: ValueType) -> set[str]:
    return {wanted.kind}.union(*(_kinds(part) for part in wanted.of))


def _drawn(name: str, parameter: inspect.Parameter, width: int, height: int) -> Any:
    """Raises InvalidRequestError for what no request can bring."""
    medium = _medium(name, parameter)
    if medium == "sound":
        return _tone()
    if medium == "video":
        frames = range(FEW_FRAMES)
        return [
            _file(_mask(width, height) if MASKS & set(name.split("_")) else _picture(width, height, f)) for f in frames
        ]
    if medium is not None:
        file = _file(_mask(width, height) if medium == "mask" else _picture(width, height, len(name)))
        return file if _takes_one(parameter) else [file]
    kinds = _kinds(value_type(parameter.annotation))
    if "prompt" in name or kinds & {"str", "any"}:
        return PROMPT
    if kinds & {"int", "float"}:
        return [1] if kinds & {"list", "row"} else 1
    if "bool" in kinds:
        return False
    raise InvalidRequestError(f"its call needs {name}, which no request can bring: {parameter.annotation}", name)


def _takes_one(parameter: inspect.Parameter) -> bool:
    wanted = value_type(parameter.annotation)
    kinds = {choice.kind for choice in (wanted.of if wanted.kind == "union" else (wanted,))}
    return bool(kinds & {"picture", "any", "object", "tensor"}) or not kinds & {"list", "row"}


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """Slopes of colour under noise: any loss of it shows in what is made of it."""
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3))
    across, down = np.linspace(0, 127, width)[None, :, None], np.linspace(0, 64, height)[:, None, None]
    return Image.fromarray((across + down + noise).astype(np.uint8))


def _mask(width: int, height: int) -> Image.Image:
    """White, to be made anew, in the middle."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 255
    return Image.fromarray(pixels)


def _tone() -> torch.Tensor:
    """One second in two channels, of the shape [2, samples]."""
    return torch.sin(torch.arange(SAMPLE_RATE) * (2 * torch.pi * 440 / SAMPLE_RATE)).repeat(2, 1)


def _file(picture: Image.Image) -> InputImage:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return InputImage(file.getvalue())


def _file_or_value(value: Any) -> Any:
    """Raises InvalidRequestError for a file that cannot be read."""
    if isinstance(value, list):
        return [_file_or_value(item) for item in value]
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    try:
        return InputImage(Path(value[1:]).expanduser().read_bytes())
    except OSError as error:
        raise InvalidRequestError(f"{value[1:]} cannot be read: {error.strerror}") from error


def _word(value: Any) -> str:
    if isinstance(value, InputImage):
        return "a picture"
    if isinstance(value, list) and value and isinstance(value[0], InputImage):
        return f"{len(value)} pictures"
    return "a sound" if isinstance(value, torch.Tensor) else repr(value)
