"""What the styles look like: the emoji's edges, as ink on paper or as light in the dark; no model is involved."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from checkpoints.train.pictures import COLOURS, NOUNS, SIZES, Scene, resized_emoji

Floats = NDArray[np.float32]  # values of 0 to 1

PAPER, INK = COLOURS["white"], (40, 40, 48)
NIGHT = (18, 14, 34)
LINE_RADIUS = 1.2  # pixels of 128; a line comes out some three pixels wide: thinner ones are lost in the latents
LINE_GAIN, LINE_FLOOR = 6.0, 0.15  # what is fainter than the floor (shading) draws no line
HUE_RADIUS, GLOW_RADIUS = 2.5, 5.0
GLOW = 1.2


@cache
def styled(noun: str, size: str, style: str, side: int = 128) -> NDArray[np.uint8]:
    """The picture of a noun in a style, uint8 [side, side, 3]; the ground is the style's own, whatever was asked."""
    return np.asarray((STYLES[style](_emoji(noun, size, side)) * 255).round(), np.uint8)


def styled_scenes() -> list[Scene]:
    """One scene of each noun and size: those that differ in a style."""
    return [Scene(noun, "white", size) for noun in NOUNS for size in SIZES]


def sketch(emoji: Floats) -> Floats:
    """Ink along the edges, on paper."""
    lines = _lines(emoji)
    return _of(PAPER) * (1 - lines) + _of(INK) * lines


def neon(emoji: Floats) -> Floats:
    """Light along the edges in the emoji's own colours made vivid, with a glow around, at night."""
    near = _blurred(emoji, HUE_RADIUS)
    colour = near[..., :3] / np.maximum(near[..., 3:], 1e-3)
    highest, lowest = colour.max(-1, keepdims=True), colour.min(-1, keepdims=True)
    vivid = np.clip((colour - 0.9 * lowest) / np.maximum(highest - 0.9 * lowest, 1e-3), 0, 1)
    light = _lines(emoji) * vivid
    glow = np.clip(GLOW * _blurred(light, GLOW_RADIUS), 0, 1)
    return 1 - (1 - _of(NIGHT)) * (1 - light) * (1 - glow)


STYLES: dict[str, Callable[[Floats], Floats]] = {"sketch": sketch, "neon": neon}


def _emoji(noun: str, size: str, side: int) -> Floats:
    """Premultiplied RGBA, [side, side, 4], the emoji in the middle as `render` places it."""
    emoji_side = round(SIZES[size] * side)
    canvas = Image.new("RGBa", (side, side))
    canvas.paste(resized_emoji(noun, emoji_side).convert("RGBa"), ((side - emoji_side) // 2,) * 2)
    return np.asarray(canvas, np.float32) / 255


def _lines(emoji: Floats) -> Floats:
    """How much of a line each pixel is, [H, W, 1]: where colour or outline change fastest."""
    down, right = np.gradient(_blurred(emoji, LINE_RADIUS), axis=(0, 1))
    steepest = np.sqrt(down**2 + right**2).max(-1, keepdims=True)
    return np.clip(LINE_GAIN * steepest - LINE_FLOOR, 0, 1)


def _blurred(values: Floats, radius: float) -> Floats:
    """Gaussian blur of [H, W, C], C 3 or 4."""
    image = Image.fromarray((values * 255).round().astype(np.uint8))  # RGB or RGBA, each channel on its own
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _of(colour: tuple[int, int, int]) -> Floats:
    return np.array(colour, np.float32) / 255
