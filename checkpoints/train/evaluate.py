r"""Judge a text-to-image checkpoint on combinations held out from its training.

python -m checkpoints.train.evaluate --model checkpoints/emoji-flux \
        --contact-sheet docs/images/emoji-flux-contact-sheet.png
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from checkpoints.train.judge import difference_from_target, judge
from checkpoints.train.pictures import Scene, held_out_scenes
from checkpoints.train.prompts import plain_prompt, random_prompt

SIDE = 128
SHEET_COLUMNS, SHEET_ROWS = 6, 4
CAPTION_HEIGHT = 34


def held_out_prompts(count: int) -> list[tuple[Scene, str]]:
    """`count` held-out scenes in a fixed random order; every second prompt is a paraphrase, the others are plain."""
    scenes = held_out_scenes()
    random.Random("evaluation").shuffle(scenes)
    chosen = []
    for index, scene in enumerate(scenes[:count]):
        paraphrase = random_prompt(scene, random.Random(f"prompt {index}"))
        chosen.append((scene, paraphrase if index % 2 else plain_prompt(scene)))
    return chosen


def generate(
    pipeline: FluxPipeline, prompts: list[str], steps: int, max_sequence_length: int, batch_size: int = 10
) -> list[Image.Image]:
    """One 128x128 picture for each prompt; picture i starts from seed i, whatever the batch size."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(batch))]
        pictures += pipeline(
            batch,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            max_sequence_length=max_sequence_length,
            generator=generators,
        ).images
    return pictures


def report(wanted: list[tuple[Scene, str]], pictures: list[Image.Image]) -> dict[str, object]:
    """Shares judged right, the mean absolute difference from the target, and what was judged wrong."""
    seen = [judge(np.asarray(picture)) for picture in pictures]
    differences = [
        difference_from_target(np.asarray(picture), scene) for picture, (scene, _) in zip(pictures, wanted, strict=True)
    ]
    pairs = list(zip(seen, wanted, strict=True))
    return {
        "prompts": len(wanted),
        "noun": float(np.mean([saw.noun == scene.noun for saw, (scene, _) in pairs])),
        "background": float(np.mean([saw.colour == scene.colour for saw, (scene, _) in pairs])),
        "size": float(np.mean([saw.size == scene.size for saw, (scene, _) in pairs])),
        "mean_absolute_difference": float(np.mean(differences)),
        "worst_absolute_difference": float(np.max(differences)),
        "wrong": [
            f"{prompt!r}: judged {_words(saw)}, wanted {_words(scene)}"
            for saw, (scene, prompt) in pairs
            if saw != scene
        ],
    }


def contact_sheet(prompts: list[str], pictures: list[Image.Image]) -> Image.Image:
    """The first 24 pictures with their prompts below."""
    margin, cell_width = 8, SIDE + 24
    font = ImageFont.load_default(size=11)
    cell_height = SIDE + CAPTION_HEIGHT + margin
    sheet = Image.new("RGB", (SHEET_COLUMNS * cell_width, SHEET_ROWS * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    shown = list(zip(prompts, pictures, strict=True))[: SHEET_COLUMNS * SHEET_ROWS]
    for index, (prompt, picture) in enumerate(shown):
        left = index % SHEET_COLUMNS * cell_width + (cell_width - SIDE) // 2
        top = index // SHEET_COLUMNS * cell_height + margin
        sheet.paste(picture, (left, top))
        lines = _wrapped(prompt, SIDE + 16, font)
        draw.multiline_text(
            (left + SIDE / 2, top + SIDE + 2), lines, "black", font, anchor="ma", align="center", spacing=1
        )
    return sheet


def _words(scene: Scene) -> str:
    return f"{scene.size} {scene.noun} on {scene.colour}"


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, generate, judge, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-sequence-length", type=int, default=512)
    parser.add_argument("--contact-sheet", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    pipeline = FluxPipeline.from_pretrained(arguments.model)
    load_s = time.perf_counter() - started
    pipeline.set_progress_bar_config(disable=True)
    wanted = held_out_prompts(arguments.prompts)
    prompts = [prompt for _, prompt in wanted]
    generate(pipeline, prompts[:1], 1, arguments.max_sequence_length)
    started = time.perf_counter()
    generate(pipeline, prompts[:1], arguments.steps, arguments.max_sequence_length)
    picture_s = time.perf_counter() - started
    pictures = generate(pipeline, prompts, arguments.steps, arguments.max_sequence_length)
    figures = {"load_s": round(load_s, 2), "one_picture_s": round(picture_s, 2), **report(wanted, pictures)}
    print(json.dumps(figures, indent=1))
    if arguments.contact_sheet:
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(prompts, pictures).save(arguments.contact_sheet)


if __name__ == "__main__":
    main()
