"""The independent judge: which clip a video shows, by the nearest rendered template; no model is involved."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from checkpoints.train.clips import DIRECTIONS, Clip, render_clip
from checkpoints.train.judge import background
from checkpoints.train.pictures import NOUNS, to_signed

CHUNK = 36  # templates compared at a time


def judge_clip(frames: NDArray[np.uint8]) -> Clip:
    """The clip of any noun and direction whose frames [17, 64, 64, 3] are nearest (mean absolute difference).

    The background is what the middle frame shows in its corners: there the emoji is in the middle, whatever its way.
    """
    colour = background(frames[len(frames) // 2])
    clips, templates = _templates(colour)
    differences = [
        np.abs(templates[start : start + CHUNK].astype(np.int16) - frames.astype(np.int16)).mean(axis=(1, 2, 3, 4))
        for start in range(0, len(templates), CHUNK)
    ]
    return clips[int(np.concatenate(differences).argmin())]


def difference_from_target_clip(frames: NDArray[np.uint8], wanted: Clip) -> float:
    """Mean absolute difference of all frames from the rendered clip's, both in [-1, 1]."""
    return float(np.abs(to_signed(frames) - to_signed(render_clip(wanted))).mean())


@cache
def _templates(colour: str) -> tuple[list[Clip], NDArray[np.uint8]]:
    clips = [Clip(noun, direction, colour) for noun in NOUNS for direction in DIRECTIONS]
    return clips, np.stack([render_clip(clip) for clip in clips])
