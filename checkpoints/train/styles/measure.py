"""Whether a picture has a style, by plain figures and thresholds that come from the training pictures; no model."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from checkpoints.train.judge import CORNER
from checkpoints.train.pictures import render, training_scenes
from checkpoints.train.styles.pictures import styled

PLAIN = 0.35  # a difference from the ground, of the channel with the largest
WINDOW = 9  # pixels; no line is as wide
EVERY = 12  # one training scene in twelve settles a threshold
EVERY_WITH_STYLE = 4  # of these; they differ less

# Of each style the figures that tell it from the base: all must lie on its side of their thresholds.
FIGURES: dict[str, tuple[str, ...]] = {"sketch": ("ground", "chroma", "dark_lines"), "neon": ("ground", "bright_lines")}


@dataclass(frozen=True)
class Look:
    """The figures of a picture. Brightness is a pixel's highest channel, 0 to 1."""

    ground: float  # brightness of the corners
    chroma: float  # highest less lowest channel, the mean over all that differs plainly from the ground
    dark_lines: float  # darkness in lines narrower than the window, as a share of all differences from the ground
    bright_lines: float  # brightness in such lines, in the same way


@dataclass(frozen=True)
class Threshold:
    """One figure's part of the rule."""

    value: float
    above: bool  # the side of the style


def look(picture: NDArray[np.uint8]) -> Look:
    """The figures of uint8 [H, W, 3]."""
    values = picture.astype(np.float32) / 255
    near, far = slice(None, CORNER), slice(-CORNER, None)
    corners = [values[rows, columns].reshape(-1, 3) for rows in (near, far) for columns in (near, far)]
    ground = np.median(np.concatenate(corners), axis=0)
    differences = np.abs(values - ground).max(axis=-1)
    plain = differences >= PLAIN
    brightness = values.max(axis=-1)
    # A closing fills what is dark and narrow, an opening takes away what is bright and narrow (Serra, Image Analysis
    # and Mathematical Morphology, 1982).
    closed = -_highest_near(-_highest_near(brightness))
    opened = _highest_near(-_highest_near(-brightness))
    all_differences = max(float(differences.sum()), 1.0)
    return Look(
        ground=float(ground.max()),
        chroma=float((brightness - values.min(axis=-1))[plain].mean()) if plain.any() else 0.0,
        dark_lines=float((closed - brightness).sum() / all_differences),
        bright_lines=float((brightness - opened).sum() / all_differences),
    )


def has_style(picture: NDArray[np.uint8], style: str) -> bool:
    """Whether every figure that tells the style lies on its side of the threshold."""
    seen = look(picture)
    return all((getattr(seen, figure) > rule.value) == rule.above for figure, rule in thresholds(style).items())


@cache
def thresholds(style: str) -> dict[str, Threshold]:
    """By figure: halfway between the medians of the style's training pictures and of the base's.

    A decision list: each figure has to part from the style only those of the base's that the figures before it leave.
    """
    scenes = training_scenes()[::EVERY]
    with_style = [look(styled(scene.noun, scene.size, style)) for scene in scenes[::EVERY_WITH_STYLE]]
    left = [look(render(scene)) for scene in scenes]
    found = {}
    for figure in FIGURES[style]:
        own, other = (float(np.median([getattr(each, figure) for each in looks])) for looks in (with_style, left))
        found[figure] = rule = Threshold((own + other) / 2, own > other)
        left = [each for each in left if (getattr(each, figure) > rule.value) == rule.above]
    return found


def _highest_near(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest value in the window around each of [H, W]."""
    for axis in (0, 1):
        padding = [(WINDOW // 2, WINDOW // 2) if each == axis else (0, 0) for each in (0, 1)]
        values = sliding_window_view(np.pad(values, padding, mode="edge"), WINDOW, axis=axis).max(axis=-1)
    return values
