"""Judge the styles on prompts held out from the training of the base and of the styles.

python -m checkpoints.train.styles.evaluate
"""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from checkpoints.train.evaluate import generate, held_out_prompts
from checkpoints.train.judge import judge
from checkpoints.train.pictures import Scene
from checkpoints.train.styles.measure import has_style, thresholds
from checkpoints.train.styles.pictures import STYLES, styled, styled_scenes

BASE = "base"
LORAS = Path("checkpoints/emoji-flux-loras")


def load(model: Path, loras: Path) -> FluxPipeline:
    """The pipeline with both styles loaded and none switched on."""
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for style in STYLES:
        pipeline.load_lora_weights(loras, weight_name=f"{style}.safetensors", adapter_name=style)
    pipeline.disable_lora()
    return pipeline


def use(pipeline: FluxPipeline, scales: dict[str, float]) -> None:
    """Switch on these styles, and no others."""
    if scales:
        pipeline.enable_lora()
        pipeline.set_adapters(list(scales), list(scales.values()))
    else:
        pipeline.disable_lora()


def judge_style(picture: NDArray[np.uint8], style: str) -> tuple[str, str]:
    """The noun and size whose picture in this style is nearest (mean absolute difference)."""
    templates = _templates(style)
    differences = np.abs(templates.astype(np.int16) - picture.astype(np.int16)).mean(axis=(1, 2, 3))
    scene = styled_scenes()[int(differences.argmin())]
    return scene.noun, scene.size


def report(wanted: list[tuple[Scene, str]], pictures: list[Image.Image], made_with: str) -> dict[str, object]:
    """Shares with the noun and the size right, and by style the share that the measure takes for it."""
    arrays = [np.asarray(picture) for picture in pictures]
    seen = [_noun_and_size(array, made_with) for array in arrays]
    pairs = list(zip(seen, wanted, strict=True))
    return {
        "prompts": len(wanted),
        "noun": float(np.mean([noun == scene.noun for (noun, _), (scene, _) in pairs])),
        "size": float(np.mean([size == scene.size for (_, size), (scene, _) in pairs])),
        "taken_for": {style: float(np.mean([has_style(array, style) for array in arrays])) for style in STYLES},
        "wrong_nouns": [f"{prompt!r}: judged {noun}" for (noun, _), (scene, prompt) in pairs if noun != scene.noun],
    }


def _noun_and_size(picture: NDArray[np.uint8], made_with: str) -> tuple[str, str]:
    if made_with in STYLES:
        return judge_style(picture, made_with)
    scene = judge(picture)
    return scene.noun, scene.size


@cache
def _templates(style: str) -> NDArray[np.uint8]:
    return np.stack([styled(scene.noun, scene.size, style) for scene in styled_scenes()])


def main() -> None:
    """Read the arguments, generate the same prompts from the same seeds without a style and in each, print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/emoji-flux"))
    parser.add_argument("--loras", type=Path, default=LORAS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--max-sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    pipeline = load(arguments.model, arguments.loras)
    wanted = held_out_prompts(arguments.prompts)
    for name in (BASE, *STYLES):
        use(pipeline, {name: arguments.scale} if name in STYLES else {})
        prompts = [prompt for _, prompt in wanted]
        pictures = generate(pipeline, prompts, arguments.steps, arguments.max_sequence_length)
        print(json.dumps({name: report(wanted, pictures, name)}, indent=1), flush=True)
    for style in STYLES:
        print(style, thresholds(style))


if __name__ == "__main__":
    main()
