"""The independent judge: which scene a picture shows, by the nearest rendered template; no model is involved."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from checkpoints.train.pictures import COLOURS, NOUNS, SIZES, Scene, render, to_signed

CORNER = 6  # pixels; no emoji reaches that far into a corner


def judge(picture: NDArray[np.uint8]) -> Scene:
    """The scene whose rendering is nearest (mean absolute difference), on the background seen in the corners."""
    colour = background(picture)
    scenes, templates = _templates(colour, picture.shape[0])
    differences = np.abs(templates.astype(np.int16) - picture.astype(np.int16)).mean(axis=(1, 2, 3))
    return scenes[int(differences.argmin())]


def background(picture: NDArray[np.uint8]) -> str:
    """The palette's colour nearest to the median of the four corners."""
    near, far = slice(None, CORNER), slice(-CORNER, None)
    corners = [picture[rows, columns].reshape(-1, 3) for rows in (near, far) for columns in (near, far)]
    seen = np.median(np.concatenate(corners).astype(np.float32), axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(seen - np.array(COLOURS[name])).sum()))


def difference_from_target(picture: NDArray[np.uint8], wanted: Scene) -> float:
    """Mean absolute difference from the rendered scene, both in [-1, 1]."""
    target = render(wanted, picture.shape[0])
    return float(np.abs(to_signed(picture) - to_signed(target)).mean())


@cache
def _templates(colour: str, side: int) -> tuple[list[Scene], NDArray[np.uint8]]:
    scenes = [Scene(noun, colour, size) for noun in NOUNS for size in SIZES]
    return scenes, np.stack([render(scene, side) for scene in scenes])
