r"""What the transformers make of training prompts, for the last part of the decoder's training.

python -m checkpoints.train.sample_latents --model runs/wan_model --out runs/wan_samples.pt
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import WanPipeline

from checkpoints.train.clip_prompts import random_prompt
from checkpoints.train.clips import DIRECTIONS, FRAMES, SIDE, Clip, training_clips
from checkpoints.train.pictures import NOUNS

BATCH_SIZE = 9


def chosen_clips() -> list[Clip]:
    """Each noun in each direction once, on a colour drawn at random from those that are not held out."""
    clips = training_clips()
    chosen = []
    for noun in NOUNS:
        for direction in DIRECTIONS:
            allowed = [clip for clip in clips if clip.noun == noun and clip.direction == direction]
            chosen.append(random.Random(f"sampled {noun} {direction}").choice(allowed))
    random.Random("sampled").shuffle(chosen)
    return chosen


def main() -> None:
    """Read the arguments, generate latents [N, 16, 5, 8, 8] of `chosen_clips()`, save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    pipeline = WanPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    clips, sampled = chosen_clips(), []
    for start in range(0, len(clips), BATCH_SIZE):
        prompts = [random_prompt(clip, random.Random(f"sampled {clip}")) for clip in clips[start : start + BATCH_SIZE]]
        latents = pipeline(
            prompts,
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=arguments.steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(10_000 + start),
            output_type="latent",
        ).frames
        sampled.append(latents)
        print(f"{start + len(prompts)} of {len(clips)}", flush=True)
    torch.save(torch.cat(sampled), arguments.out)


if __name__ == "__main__":
    main()
