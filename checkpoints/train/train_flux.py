"""Train emoji-flux's transformer, and its text encoders with it (rectified flow, as FLUX).

python -m checkpoints.train.train_flux --text runs/text.pt --out runs/flux
"""

import argparse
import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from checkpoints.train.flux_parts import FluxParts, pack
from checkpoints.train.latents import latents_of, scene_pictures
from checkpoints.train.pictures import training_scenes
from checkpoints.train.prompts import random_prompt
from checkpoints.train.tokenizers import T5_MAX_LENGTH

SAVE_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_steps: int = 800  # the last ones, with a falling learning rate
    # Padding grows from none to FLUX's 512 tokens: 500 padding tokens would drown the words of an untrained model.
    padding_growth_steps: int = 500
    average_decay: float = 0.998


def train(latents: Tensor, text_weights: Path, out: Path, recipe: Recipe, device: str) -> None:
    """Train on the latents [N, C, 16, 16] of `training_scenes()`; `out`/state.pt holds everything, every 100 steps."""
    torch.manual_seed(0)
    attention_in_float32()
    scenes = training_scenes()
    packed = pack(latents).to(device)
    model = FluxParts().to(device)
    start_gently(model)
    text = torch.load(text_weights, map_location=device)
    model.clip.load_state_dict(text["clip"])
    model.t5.load_state_dict(text["t5"])
    average = copy.deepcopy(model)
    optimizers = build_optimizers(model, recipe.learning_rate)
    first_step = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    started, recent = time.time(), []
    for step in range(first_step, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_share(step, recipe)
        rng = random.Random(step)
        picked = [rng.randrange(len(scenes)) for _ in range(recipe.batch_size)]
        prompts = [random_prompt(scenes[index], rng) for index in picked]
        clean = packed[picked]
        noise_source = torch.Generator().manual_seed(step)
        noise = torch.randn(clean.shape, generator=noise_source).to(device)
        # Below sigma 0.9 the noisy picture itself tells the noun; only above it is the prompt listened to.
        sigma = torch.sigmoid(1.5 + 1.2 * torch.randn(len(picked), generator=noise_source)).to(device)
        noisy = (1.0 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        with torch.autocast(device, torch.bfloat16):
            velocity = model(noisy, sigma, prompts, padded_length(step, recipe, rng))
        loss = ((velocity.float() - (noise - clean)) ** 2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, min(recipe.average_decay, (step + 1) / (step + 20)))
        recent.append(loss.item())
        if step % 10 == 9:
            pace = (time.time() - started) / (step + 1 - first_step)
            print(f"step {step + 1} loss {np.mean(recent):.4f} {pace:.2f} s/step", flush=True)
            recent = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")


def attention_in_float32() -> None:
    """Keep attention out of autocast: on a CPU its bfloat16 backward pass takes as long as the rest of the model."""
    dispatch = transformer_flux.dispatch_attention_fn

    def in_float32(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            attended: Tensor = dispatch(query.float(), key.float(), value.float(), **options)
        return attended

    transformer_flux.dispatch_attention_fn = in_float32


def start_gently(model: FluxParts) -> None:
    """Blocks start as the identity (adaLN-zero, as in DiT: Peebles and Xie, 2023, section 3.2)."""
    for name, layer in model.transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(
            ("norm.linear", "norm1.linear", "norm1_context.linear", "proj_out")
        ):
            if name.startswith("single_transformer_blocks") and name.endswith("proj_out"):
                continue
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def build_optimizers(model: FluxParts, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_block = "transformer_blocks" in name and parameter.ndim == 2
            (matrices if in_block else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = learning_rate
    return [muon, adam]


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, then a linear fall to 2 %."""
    return min(1.0, (step + 1) / recipe.warmup_steps, 0.02 + 0.98 * (recipe.steps - step) / recipe.decay_steps)


def padded_length(step: int, recipe: Recipe, rng: random.Random) -> int:
    """The T5 length of a step: grows to 512, FluxPipeline's default; then 512 half of the time, else a shorter one."""
    grown = min(1.0, step / recipe.padding_growth_steps)
    share = grown if rng.random() < 0.5 else grown * rng.random()
    length: int = round(T5_MAX_LENGTH**share)
    return length


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the parameters towards the model's."""
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)


def main() -> None:
    """Read the arguments, encode the scenes, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="what train_text wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--decay-steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    latents = latents_of(scene_pictures(training_scenes()))
    recipe = Recipe(arguments.steps, decay_steps=arguments.decay_steps, learning_rate=arguments.learning_rate)
    train(latents, arguments.text, arguments.out, recipe, arguments.device)


if __name__ == "__main__":
    main()
