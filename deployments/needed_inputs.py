"""What a pipeline's call does not begin without, made up: words, grey pictures, silence; and the file it makes."""

from __future__ import annotations

import io
import wave
from typing import Any

from PIL import Image

from deployments.messages import InputImage, InputSound, MediaKind, OutputFormat, StageDescription, ValueType

FEW_SECONDS = 1.0  # of a sound
FEW_FRAMES = 9  # 4 x 2 + 1 and 8 x 1 + 1: what the VAEs of videos can pack
SOUND_RATE = 16_000  # samples per second of a sound that is sent along
PROMPT = "a picture"
PLAIN: dict[str, Any] = {"str": PROMPT, "int": 1, "float": 1.0, "bool": False}

OUTPUTS: dict[MediaKind, OutputFormat] = {
    "image": OutputFormat("image", "png"),
    "video": OutputFormat("video", "mp4"),
    "audio": OutputFormat("audio", "wav"),
    "tensors": OutputFormat("tensors", "safetensors"),
}


def needed_inputs(description: StageDescription, side: int) -> dict[str, Any]:
    """By argument; pictures have `side` pixels on each side."""
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
