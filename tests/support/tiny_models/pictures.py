"""Input pictures of the requests: fixed noise, so that any loss of it shows in the output."""

import numpy as np
from PIL import Image


def noise_image(size: int = 32, *, seed: int = 0) -> Image.Image:
    """An RGB picture of `size` x `size` random pixels."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8))


def noise_video(num_frames: int = 9, size: int = 16) -> list[Image.Image]:
    """`num_frames` different pictures."""
    return [noise_image(size, seed=frame) for frame in range(num_frames)]


def center_mask(size: int = 32) -> Image.Image:
    """A mask that is white (repaint) in an off-centre block and black (keep) elsewhere."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[size // 4 : size * 3 // 4, size // 4 : size // 2] = 255
    return Image.fromarray(pixels)
