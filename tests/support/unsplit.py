"""What the unsplit pipeline makes of a request: the truth of the tests of served behaviour."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.support.served_application import DEFAULT_ARGUMENTS
from tests.support.tiny_models.checkpoints import load_unsplit


def unsplit_picture(checkpoint: Path, seed: int, **arguments: Any) -> Image.Image:
    """The picture for these arguments over the served application's defaults."""
    [picture] = _run(checkpoint, seed, arguments).images
    return picture


def unsplit_video(checkpoint: Path, seed: int, **arguments: Any) -> list[Image.Image]:
    """The frames of the video for these arguments over the served application's defaults."""
    [frames] = _run(checkpoint, seed, arguments).frames
    return frames


def _run(checkpoint: Path, seed: int, arguments: dict[str, Any]) -> Any:
    generator = torch.Generator("cpu").manual_seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        return _pipeline(checkpoint)(**DEFAULT_ARGUMENTS | arguments, generator=generator, output_type="pil")


@cache
def _pipeline(checkpoint: Path) -> Any:
    return load_unsplit(checkpoint)
