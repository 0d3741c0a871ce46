"""What a pipeline returned becomes pixels, by its type, its axes and the place of its channels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.errors import GenerationFailedError, NotNumbersError
from deployments.media.files import Pixels

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
DTYPES = {8: torch.uint8, 16: torch.uint16}
SIXTEEN_BITS = 257  # 65 535 / 255


@dataclass(frozen=True)
class Reading:
    """How numbers are to be read as colours."""

    bit_depth: int = 8  # of the pixels that are made
    is_map: bool = False  # a measure: the axis of its channels may be missing
    is_signed: bool = False  # -1..1 in place of 0..1
    is_linear: bool = False  # linear light, of which sRGB shows 0..1

    @property
    def highest(self) -> int:
        return int(2**self.bit_depth - 1)


def to_pixels(made: Any, reading: Reading = Reading()) -> list[Pixels]:
    """Each picture of a PIL image, of a tensor or array [..., C, H, W] or [..., H, W, C], or of nested lists of them.

    Floats are 0..1, bytes 0..255. They are rounded as diffusers rounds them for PIL; what lies outside is clipped.
    Raises NotNumbersError for values that are not finite, GenerationFailedError for what is no picture.
    """
    if isinstance(made, list | tuple):
        return [pixels for item in made for pixels in to_pixels(item, reading)]
    if isinstance(made, Image.Image):  # some pipelines return these whatever the output_type
        return [_of_picture(made, reading)]
    if isinstance(made, np.ndarray | torch.Tensor):
        last = _channels_last(made, reading)
        if last is not None and (last.is_floating_point() or last.dtype in (torch.uint8, torch.bool)):
            # One behind the other, as they are handed on through shared memory.
            pixels = _rounded(last, reading).reshape(-1, *last.shape[-3:]).contiguous()
            return list(pixels.cpu().numpy())
    raise GenerationFailedError(
        f"cannot write {described(made)} as pictures: a tensor [..., C, H, W] with C 1, 3 or 4 is needed"
    )


def each_video(made: Any) -> list[Any]:
    """The videos of a batch; a lone video of four axes, or a list of frames, is a batch of one."""
    if isinstance(made, np.ndarray | torch.Tensor):
        return [_frames_first(video) for video in (made if made.ndim == 5 else [made])]
    is_frame = isinstance(made[0], Image.Image) or getattr(made[0], "ndim", 0) == 3
    return [made] if is_frame else [_frames_first(video) for video in made]


def reading_of_map(output: Any, field: str, bit_depth: int) -> Reading:
    """The range is the one that the documentation of the output's class states; else negative values tell it."""
    documentation = inspect.getdoc(type(output)) or ""
    stated = re.search(rf"{field} \(.*?range \[(-?\d+), (-?\d+)\]", documentation, re.DOTALL)
    is_signed = stated[1].startswith("-") if stated else any(bool((part < 0).any()) for part in _parts(output, field))
    return Reading(bit_depth, is_map=True, is_signed=is_signed)


def as_tensor(made: Any) -> torch.Tensor:
    """The numbers of a tensor or an array."""
    if isinstance(made, torch.Tensor):
        return made.detach()
    return torch.from_numpy(np.require(made, requirements=["C", "W"]))


def described(value: Any) -> str:
    """For people: its type and its shape."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


def _parts(output: Any, field: str) -> Iterator[Any]:
    made = getattr(output, field)
    for part in made if isinstance(made, list | tuple) else [made]:
        if isinstance(part, np.ndarray | torch.Tensor):
            yield part


def _of_picture(picture: Image.Image, reading: Reading) -> Pixels:
    if picture.mode != "L":
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return pixels.astype(np.uint16) * SIXTEEN_BITS if reading.bit_depth == 16 else pixels


def _channels_last(made: Any, reading: Reading) -> torch.Tensor | None:
    """[..., H, W, C]: where both places could be that of the channels, torch's is before the sides, numpy's behind."""
    numbers = as_tensor(made)
    shape = numbers.shape
    is_first = len(shape) >= 3 and shape[-3] in CHANNELS
    is_last = len(shape) >= 3 and shape[-1] in CHANNELS
    if is_last and not (is_first and isinstance(made, torch.Tensor)):
        return numbers
    if is_first:
        return numbers.movedim(-3, -1)
    if len(shape) == 2 or (reading.is_map and len(shape) > 2):
        return numbers[..., None]
    return None


def _frames_first(video: Any) -> Any:
    """A video [C, F, H, W] is what a decoder returned, -1..1: as diffusers' VideoProcessor makes frames of it.

    The processor's own frames are never below 0, which tells the two apart where both axes may be the channels.
    """
    if not isinstance(video, np.ndarray | torch.Tensor) or video.ndim != 4:
        return video
    numbers = as_tensor(video)
    first, second, last = numbers.shape[0], numbers.shape[1], numbers.shape[-1]
    if last in CHANNELS and second not in CHANNELS:
        return video
    if first in CHANNELS and (second not in CHANNELS or bool((numbers < 0).any())):
        return numbers.movedim(0, 1).float() / 2 + 0.5
    return video


def _rounded(numbers: torch.Tensor, reading: Reading) -> torch.Tensor:
    """As numpy_to_pil of diffusers.image_processor, before the copy from the device: a quarter of the bytes."""
    if numbers.dtype == torch.bool:
        numbers = numbers.float()
    elif not numbers.is_floating_point():
        return numbers.to(torch.int32).mul(SIXTEEN_BITS).to(torch.uint16) if reading.bit_depth == 16 else numbers
    if not torch.isfinite(numbers).all():
        raise NotNumbersError
    if numbers.dtype != torch.float64:
        numbers = numbers.float()
    if reading.is_signed:
        numbers = numbers / 2 + 0.5
    if reading.is_linear:
        numbers = _to_srgb(numbers.clamp(0, 1))
    return numbers.mul(reading.highest).round().clamp(0, reading.highest).to(DTYPES[reading.bit_depth])


def _to_srgb(light: torch.Tensor) -> torch.Tensor:
    """The transfer function of IEC 61966-2-1."""
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light.pow(1 / 2.4) - 0.055)
