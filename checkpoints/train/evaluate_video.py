r"""Judge a text-to-video checkpoint on combinations held out from its training.

    python -m checkpoints.train.evaluate_video --model checkpoints/emoji-wan \
        --contact-sheet docs/images/emoji-wan-contact-sheet.png
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from checkpoints.train.clip_judge import difference_from_target_clip, judge_clip
from checkpoints.train.clip_prompts import plain_prompt, random_prompt
from checkpoints.train.clips import FRAMES, SIDE, Clip, held_out_clips

SHEET_CLIPS, SHEET_FRAMES, SHEET_ZOOM = 8, (0, 4, 8, 12, 16), 2


def held_out_prompts(count: int) -> list[tuple[Clip, str]]:
    """`count` held-out clips in a fixed random order; every second prompt is a paraphrase, the others are plain."""
    clips = held_out_clips()
    random.Random("evaluation").shuffle(clips)
    chosen = []
    for index, clip in enumerate(clips[:count]):
        paraphrase = random_prompt(clip, random.Random(f"clip prompt {index}"))
        chosen.append((clip, paraphrase if index % 2 else plain_prompt(clip)))
    return chosen


def generate(pipeline: WanPipeline, prompts: list[str], steps: int, batch_size: int = 5) -> list[NDArray[np.uint8]]:
    """The frames [17, 64, 64, 3] of a video for each prompt; video i starts from seed i, whatever the batch size."""
    videos: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(batch))]
        frames = pipeline(
            batch,
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=generators,
        ).frames
        videos += list((frames * 255).round().astype(np.uint8))
    return videos


def report(wanted: list[tuple[Clip, str]], videos: list[NDArray[np.uint8]]) -> dict[str, object]:
    """Shares judged right, the mean absolute difference from the target, and what was judged wrong."""
    pairs = [(judge_clip(frames), clip, prompt) for frames, (clip, prompt) in zip(videos, wanted, strict=True)]
    differences = [difference_from_target_clip(frames, clip) for frames, (clip, _) in zip(videos, wanted, strict=True)]
    return {
        "prompts": len(wanted),
        "noun": float(np.mean([saw.noun == clip.noun for saw, clip, _ in pairs])),
        "direction": float(np.mean([saw.direction == clip.direction for saw, clip, _ in pairs])),
        "background": float(np.mean([saw.colour == clip.colour for saw, clip, _ in pairs])),
        "mean_absolute_difference": float(np.mean(differences)),
        "worst_absolute_difference": float(np.max(differences)),
        "wrong": [
            f"{prompt!r}: judged {_words(saw)}, wanted {_words(clip)}" for saw, clip, prompt in pairs if saw != clip
        ],
    }


def contact_sheet(prompts: list[str], videos: list[NDArray[np.uint8]]) -> Image.Image:
    """Five frames of each of the first videos in a row, with the prompt on its left."""
    caption_width, gap, side = 220, 6, SHEET_ZOOM * SIDE
    font = ImageFont.load_default(size=14)
    rows = list(zip(prompts, videos, strict=True))[:SHEET_CLIPS]
    size = (caption_width + len(SHEET_FRAMES) * (side + gap), len(rows) * (side + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (prompt, frames) in enumerate(rows):
        top = gap + row * (side + gap)
        words = prompt.split()
        lines = [" ".join(words[: len(words) // 2 + 1]), " ".join(words[len(words) // 2 + 1 :])]
        draw.multiline_text((gap, top + side / 2), "\n".join(lines).strip(), "black", font, anchor="lm")
        for column, frame in enumerate(SHEET_FRAMES):
            enlarged = Image.fromarray(frames[frame]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (caption_width + column * (side + gap), top))
    return sheet


def _words(clip: Clip) -> str:
    return f"{clip.noun} {clip.direction} on {clip.colour}"


def main() -> None:
    """Read the arguments, generate, judge, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--contact-sheet", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    pipeline = WanPipeline.from_pretrained(arguments.model)
    load_s = time.perf_counter() - started
    pipeline.set_progress_bar_config(disable=True)
    wanted = held_out_prompts(arguments.prompts)
    prompts = [prompt for _, prompt in wanted]
    generate(pipeline, prompts[:1], 1)
    started = time.perf_counter()
    generate(pipeline, prompts[:1], arguments.steps)
    video_s = time.perf_counter() - started
    videos = generate(pipeline, prompts, arguments.steps)
    figures = {"load_s": round(load_s, 2), "one_video_s": round(video_s, 2), **report(wanted, videos)}
    print(json.dumps(figures, indent=1))
    if arguments.contact_sheet:
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(prompts, videos).save(arguments.contact_sheet, optimize=True)


if __name__ == "__main__":
    main()
