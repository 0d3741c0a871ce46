r"""One prompt in four styles, for the README: none, each of the two, and both at once.

python -m checkpoints.train.styles.show --out docs/images/emoji-flux-styles.png
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from checkpoints.train.evaluate import SIDE
from checkpoints.train.styles.evaluate import LORAS, load, use

PROMPT = "a big fox on an orange background"
SHOWN: dict[str, dict[str, float]] = {
    "no LoRA": {},
    "sketch": {"sketch": 1.0},
    "neon": {"neon": 1.0},
    "sketch 0.2 + neon 0.8": {"sketch": 0.2, "neon": 0.8},
}
MARGIN, CAPTION_HEIGHT, SCALE = 8, 24, 2  # the picture is drawn twice as large


def draw(pipeline: FluxPipeline, prompt: str, scales: dict[str, float]) -> Image.Image:
    """The picture of seed 0."""
    use(pipeline, scales)
    source = torch.Generator().manual_seed(0)
    picture: Image.Image = pipeline(prompt, height=SIDE, width=SIDE, num_inference_steps=20, generator=source).images[0]
    return picture


def row(pictures: dict[str, Image.Image]) -> Image.Image:
    """The pictures side by side, each above its caption."""
    side = SCALE * SIDE
    shown = Image.new("RGB", (len(pictures) * (side + MARGIN) + MARGIN, side + MARGIN + CAPTION_HEIGHT), "white")
    drawing, font = ImageDraw.Draw(shown), ImageFont.load_default(size=15)
    for index, (caption, picture) in enumerate(pictures.items()):
        left = MARGIN + index * (side + MARGIN)
        shown.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, MARGIN))
        drawing.text((left + side / 2, side + MARGIN + 3), caption, "black", font, anchor="ma")
    return shown


def main() -> None:
    """Read the arguments, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/emoji-flux"))
    parser.add_argument("--loras", type=Path, default=LORAS)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipeline = load(arguments.model, arguments.loras)
    row({caption: draw(pipeline, arguments.prompt, scales) for caption, scales in SHOWN.items()}).save(arguments.out)


if __name__ == "__main__":
    main()
