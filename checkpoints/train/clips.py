"""The clips emoji-wan learns: one Noto emoji that crosses a plain background in one of four directions."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from checkpoints.train.pictures import COLOURS, NOUNS, resized_emoji

SIDE = 64  # pixels
EMOJI_SIDE = 32  # pixels: four latent cells
FRAMES = 17  # one, and four groups of four: what a Wan VAE packs into five latent frames
PIXELS_PER_FRAME = 2  # one latent cell in each group of four frames; 32 pixels in all, from one edge to the other

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)

HELD_OUT_PER_NOUN = 4  # of 36 combinations: 216 of 1,944 in all, 11.1 %


@dataclass(frozen=True)
class Clip:
    """What one video shows."""

    noun: str
    direction: str
    colour: str


def all_clips() -> list[Clip]:
    """Every combination, in a fixed order (nouns, then directions, then colours)."""
    return [Clip(noun, direction, colour) for noun in NOUNS for direction in DIRECTIONS for colour in COLOURS]


def held_out_clips() -> list[Clip]:
    """The combinations no model may see in training; four of each noun, drawn by the noun's name alone."""
    held_out = []
    for noun in NOUNS:
        of_noun = [clip for clip in all_clips() if clip.noun == noun]
        held_out += random.Random(f"held out clip {noun}").sample(of_noun, HELD_OUT_PER_NOUN)
    return held_out


def training_clips() -> list[Clip]:
    """Every combination that is not held out, in the order of `all_clips`."""
    held_out = set(held_out_clips())
    return [clip for clip in all_clips() if clip not in held_out]


def render_clip(clip: Clip) -> NDArray[np.uint8]:
    """The frames of a clip, uint8 [17, 64, 64, 3]: the emoji goes from one edge to the opposite one."""
    emoji = resized_emoji(clip.noun, EMOJI_SIDE)
    frames = []
    for index in range(FRAMES):
        frame = Image.new("RGB", (SIDE, SIDE), COLOURS[clip.colour])
        frame.paste(emoji, position(clip.direction, index), emoji)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def position(direction: str, frame: int) -> tuple[int, int]:
    """The emoji's upper left corner in a frame, in pixels (x, y); in the middle frame it is centred."""
    centre, ahead = (SIDE - EMOJI_SIDE) // 2, (frame - FRAMES // 2) * PIXELS_PER_FRAME
    x, y = DIRECTIONS[direction]
    return centre + x * ahead, centre + y * ahead
