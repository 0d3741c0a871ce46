"""The pictures the embedded models learn: one Noto emoji, of one of three sizes, on one of nine plain backgrounds."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EMOJI_DIR = Path(__file__).parent / "emoji"
EMOJI_LICENSE = "Noto emoji, Copyright Google LLC, Apache License 2.0"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 60, 60),
    "blue": (60, 110, 214),
    "green": (80, 170, 90),
    "yellow": (245, 215, 90),
    "purple": (140, 90, 190),
    "orange": (240, 150, 60),
    "pink": (245, 170, 200),
    "white": (245, 245, 245),
    "black": (30, 30, 30),
}
DEFAULT_COLOUR = "white"  # what a prompt without a colour means

SIZES: dict[str, float] = {"small": 0.41, "medium": 0.66, "big": 0.875}  # share of the picture's side
DEFAULT_SIZE = "medium"  # what a prompt without a size means

NOUNS: dict[str, str] = {  # noun -> code point, the file's name in emoji/
    "cat": "1f431",
    "dog": "1f436",
    "fox": "1f98a",
    "bear": "1f43b",
    "frog": "1f438",
    "lion": "1f981",
    "pig": "1f437",
    "cow": "1f42e",
    "penguin": "1f427",
    "owl": "1f989",
    "fish": "1f41f",
    "turtle": "1f422",
    "butterfly": "1f98b",
    "bee": "1f41d",
    "snail": "1f40c",
    "octopus": "1f419",
    "apple": "1f34e",
    "banana": "1f34c",
    "lemon": "1f34b",
    "grapes": "1f347",
    "strawberry": "1f353",
    "cherries": "1f352",
    "pizza": "1f355",
    "burger": "1f354",
    "cake": "1f370",
    "donut": "1f369",
    "cookie": "1f36a",
    "mushroom": "1f344",
    "tree": "1f333",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "rose": "1f339",
    "tulip": "1f337",
    "star": "2b50",
    "sun": "2600-fe0f",
    "moon": "1f319",
    "rainbow": "1f308",
    "rocket": "1f680",
    "car": "1f697",
    "bus": "1f68c",
    "bicycle": "1f6b2",
    "sailboat": "26f5",
    "house": "1f3e0",
    "castle": "1f3f0",
    "guitar": "1f3b8",
    "soccer ball": "26bd",
    "basketball": "1f3c0",
    "umbrella": "2602-fe0f",
    "crown": "1f451",
    "robot": "1f916",
    "ghost": "1f47b",
    "snowman": "26c4",
    "gift": "1f381",
    "balloon": "1f388",
}

HELD_OUT_PER_NOUN = 4  # of 27 combinations: 216 in all, 14.8 %


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    noun: str
    colour: str
    size: str


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order (nouns, then colours, then sizes)."""
    return [Scene(noun, colour, size) for noun in NOUNS for colour in COLOURS for size in SIZES]


def held_out_scenes() -> list[Scene]:
    """The combinations no model may see in training; four of each noun, drawn by the noun's name alone."""
    held_out = []
    for noun in NOUNS:
        of_noun = [scene for scene in all_scenes() if scene.noun == noun]
        held_out += random.Random(f"held out {noun}").sample(of_noun, HELD_OUT_PER_NOUN)
    return held_out


def training_scenes() -> list[Scene]:
    """Every combination that is not held out, in the order of `all_scenes`."""
    held_out = set(held_out_scenes())
    return [scene for scene in all_scenes() if scene not in held_out]


@cache
def _emoji(noun: str) -> Image.Image:
    return Image.open(EMOJI_DIR / f"{NOUNS[noun]}.png").convert("RGBA")


@cache
def resized_emoji(noun: str, side: int) -> Image.Image:
    """The emoji of a noun, RGBA [side, side]."""
    # Premultiplied alpha, or the resampling would draw the colour hidden in transparent pixels into the edge.
    return _emoji(noun).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def render(scene: Scene, side: int = 128, offset: tuple[int, int] = (0, 0)) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [side, side, 3]; `offset` moves the emoji by (right, down) pixels."""
    emoji_side = round(SIZES[scene.size] * side)
    emoji = resized_emoji(scene.noun, emoji_side)
    picture = Image.new("RGB", (side, side), COLOURS[scene.colour])
    corner = (side - emoji_side) // 2
    picture.paste(emoji, (corner + offset[0], corner + offset[1]), emoji)
    return np.asarray(picture)


def to_signed(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 pictures to float32 in [-1, 1], the range of the VAE and of all reported differences."""
    return (pictures.astype(np.float32) / 127.5) - 1.0
