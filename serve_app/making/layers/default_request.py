"""The requests that a model must be able to make: its own default arguments, and as little else as it asks for."""

from __future__ import annotations

import io
import uuid
import wave
from collections.abc import Iterator
from typing import Any

from PIL import Image

from deployments.messages import (
    GenerationRequest,
    InputImage,
    InputSound,
    MediaKind,
    OutputFormat,
    StageDescription,
    ValueType,
)

SMALL_SIDE = 8  # multiples of the model's own: some pixels of latents, which little work is needed for
FEW_STEPS = 2
FEW_SECONDS = 1.0  # of a sound
FEW_FRAMES = 9  # 4 x 2 + 1 and 8 x 1 + 1: what the VAEs of videos can pack
SOUND_RATE = 16_000  # samples per second of a sound that is sent along
PROMPT = "a picture"
PLAIN: dict[str, Any] = {"str": PROMPT, "int": 1, "float": 1.0, "bool": False}
PLAIN_SIDE = 512  # pixels of a picture where the model has no size of its own

OUTPUTS: dict[MediaKind, OutputFormat] = {
    "image": OutputFormat("image", "png"),
    "video": OutputFormat("video", "mp4"),
    "audio": OutputFormat("audio", "wav"),
    "tensors": OutputFormat("tensors", "safetensors"),
}


def default_requests(
    description: StageDescription, model: str, default_arguments: dict[str, Any]
) -> Iterator[GenerationRequest]:
    """The cheapest first: small and short, of the model's own size, wholly by default."""
    steps = {"num_inference_steps": FEW_STEPS}
    small = description.size_multiple * SMALL_SIDE
    sizes: dict[str, float] = {"width": small, "height": small, "num_frames": FEW_FRAMES}
    if description.length_argument is not None:
        sizes[description.length_argument] = FEW_SECONDS
    own_side = description.default_width or PLAIN_SIDE
    for changes, side in ((steps | sizes, small), (steps, own_side), ({}, own_side)):
        changed = {name: value for name, value in changes.items() if description.takes(name)}
        arguments = default_arguments | _needed(description, side) | changed
        yield GenerationRequest(f"default-{uuid.uuid4().hex}", model, arguments, 0, _output(description))


def _needed(description: StageDescription, side: int) -> dict[str, Any]:
    """What the pipeline does not begin without."""
    needed: dict[str, Any] = {}
    if description.takes("prompt"):
        needed["prompt"] = PROMPT
    tasks = set(description.tasks)
    if description.needs_picture or "image" in description.required:
        needed["image"] = _picture("gray", side)
        if "inpainting" in tasks:
            needed["mask_image"] = _picture("white", side)
    if tasks == {"video_to_video"} or "video" in description.required:
        needed["video"] = [_picture("gray", side)] * FEW_FRAMES
    for name in set(description.required) - needed.keys():
        if (value := _value(description.type_of(name), side)) is not None:
            needed[name] = value
    return needed


def _value(wanted: ValueType, side: int) -> Any:
    """A file, a plain value or a list of one such, by what an argument takes; None where it is none of these."""
    kinds = {choice.kind for choice in wanted.choices_of()}
    if "picture" in kinds:
        return _picture("gray", side)
    if "video" in kinds:
        return [_picture("gray", side)] * FEW_FRAMES
    if "sound" in kinds:
        return _silence()
    if plain := [value for kind, value in PLAIN.items() if kind in kinds]:
        return plain[0]
    lists = [choice for choice in wanted.choices_of() if choice.kind in ("list", "row")]
    inside = _value(lists[0].of[0], side) if lists else None
    return None if inside is None else [inside]


def _output(description: StageDescription) -> OutputFormat:
    return OUTPUTS[description.media_kind]


def _silence() -> InputSound:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SOUND_RATE)
        sound.writeframes(bytes(2 * round(FEW_SECONDS * SOUND_RATE)))
    return InputSound(file.getvalue())


def _picture(color: str, side: int) -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return InputImage(file.getvalue())
