"""Train a style of emoji-flux: a LoRA of its transformer (rectified flow, as FLUX), in diffusers' own format.

python -m checkpoints.train.styles.train --style sketch --state runs/sketch.pt --out checkpoints/emoji-flux-loras
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from checkpoints.train.flux_parts import FluxParts, pack
from checkpoints.train.latents import latents_of
from checkpoints.train.pictures import Scene, to_signed, training_scenes
from checkpoints.train.prompts import random_prompt
from checkpoints.train.styles.pictures import STYLES, styled, styled_scenes
from checkpoints.train.tokenizers import T5_MAX_LENGTH

# Every matrix of the blocks, those that modulate among them: a ground of one colour is theirs to draw.
TARGETS = [
    "add_k_proj",
    "add_q_proj",
    "add_v_proj",
    "net.0.proj",
    "net.2",
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "proj_mlp",
    "proj_out",
    "to_add_out",
    "to_k",
    "to_out.0",
    "to_q",
    "to_v",
]
SAVE_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training."""

    steps: int
    rank: int = 12
    batch_size: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 20
    average_decay: float = 0.98


def train(pipeline: FluxPipeline, style: str, state_file: Path, out: Path, recipe: Recipe) -> None:
    """Write `out`/`style`.safetensors; `state_file` holds everything, every 50 steps, and a run goes on from there."""
    torch.manual_seed(0)
    model = parts_of(pipeline)
    adapter = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=TARGETS)
    model.requires_grad_(False)
    pipeline.transformer.add_adapter(adapter)
    trained = {name: each for name, each in pipeline.transformer.named_parameters() if each.requires_grad}
    average = {name: each.detach().clone() for name, each in trained.items()}
    optimizer = torch.optim.Muon(
        list(trained.values()), lr=recipe.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    first_step = 0
    if state_file.exists():
        state = torch.load(state_file)
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        copy(state["trained"], trained)
        copy(state["average"], average)
    scenes, clean_of = training_scenes(), style_latents(style)
    started, recent = time.time(), []
    for step in range(first_step, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe)
        loss = step_loss(model, random.Random(step).choices(scenes, k=recipe.batch_size), clean_of, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        decay = min(recipe.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, kept in average.items():
                kept.lerp_(trained[name], 1.0 - decay)
        recent.append(loss.item())
        if step % 10 == 9:
            pace = (time.time() - started) / (step + 1 - first_step)
            print(f"step {step + 1} loss {np.mean(recent):.4f} {pace:.2f} s/step", flush=True)
            recent = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            state = {"trained": trained, "average": average, "optimizer": optimizer.state_dict(), "step": step + 1}
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            save(pipeline, average, out, style)


def copy(saved: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    """Into the tensors themselves, which the model holds."""
    with torch.no_grad():
        for name, kept in into.items():
            kept.copy_(saved[name])


def parts_of(pipeline: FluxPipeline) -> FluxParts:
    """The pipeline's modules, called as in their own training: padding costs nothing there."""
    parts = FluxParts()
    parts.clip_tokenizer, parts.t5_tokenizer = pipeline.tokenizer, pipeline.tokenizer_2
    parts.clip, parts.t5, parts.transformer = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer
    return parts


def style_latents(style: str) -> dict[tuple[str, str], Tensor]:
    """By noun and size, the packed latents [64, 64] of the picture."""
    scenes = styled_scenes()
    pictures = to_signed(np.stack([styled(scene.noun, scene.size, style) for scene in scenes]))
    packed = pack(latents_of(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    return {(scene.noun, scene.size): each for scene, each in zip(scenes, packed, strict=True)}


def step_loss(model: FluxParts, scenes: list[Scene], clean_of: dict[tuple[str, str], Tensor], step: int) -> Tensor:
    """Mean squared error of the velocity, of a paraphrase of each scene at a drawn noise level."""
    rng, source = random.Random(f"step {step}"), torch.Generator().manual_seed(step)
    clean = torch.stack([clean_of[scene.noun, scene.size] for scene in scenes])
    noise = torch.randn(clean.shape, generator=source)
    sigma = torch.sigmoid(1.5 + 1.2 * torch.randn(len(scenes), generator=source))  # as the base was trained
    noisy = (1.0 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
    padded_length = round(T5_MAX_LENGTH ** (1.0 if rng.random() < 0.5 else rng.random()))
    velocity = model(noisy, sigma, [random_prompt(scene, rng) for scene in scenes], padded_length)
    loss: Tensor = ((velocity - (noise - clean)) ** 2).mean()
    return loss


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a linear fall to 2 %."""
    return min(1.0, (step + 1) / recipe.warmup_steps) * (0.02 + 0.98 * (recipe.steps - step) / recipe.steps)


def save(pipeline: FluxPipeline, weights: dict[str, Tensor], out: Path, style: str) -> None:
    """The adapter in diffusers' format, with its ranks and alphas as metadata."""
    FluxPipeline.save_lora_weights(
        out,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, weights),
        weight_name=f"{style}.safetensors",
        transformer_lora_adapter_metadata=metadata_of(pipeline.transformer),
    )


def metadata_of(transformer: nn.Module) -> dict[str, Any]:
    """What PEFT needs to build the layers again; sets in a fixed order, or no two files would be alike."""
    described = transformer.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}


def main() -> None:
    """Read the arguments, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/emoji-flux"))
    parser.add_argument("--state", type=Path, required=True, help="a file; a run goes on from it")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the LoRAs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    arguments = parser.parse_args()
    recipe = Recipe(arguments.steps, arguments.rank, learning_rate=arguments.learning_rate)
    pipeline = FluxPipeline.from_pretrained(arguments.model)
    train(pipeline, arguments.style, arguments.state, arguments.out, recipe)


if __name__ == "__main__":
    main()
