"""Train emoji-flux's transformer and text encoders on the latents of the trained VAE (rectified flow).

    python -m checkpoints.train.train_flux --vae runs/vae/vae --out runs/flux --steps 5000
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from checkpoints.train.flux_parts import FluxParts, pack
from checkpoints.train.pictures import Scene, render, to_signed, training_scenes
from checkpoints.train.prompts import random_prompt
from checkpoints.train.tokenizers import T5_MAX_LENGTH

SAVE_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training."""

    steps: int
    batch_size: int = 48
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    # Padding grows from none to FLUX's 512 tokens over this share of the steps: 500 padding tokens would drown the words
    # of an untrained model.
    padding_growth: float = 0.4
    average_decay: float = 0.998


def encode_scenes(vae: AutoencoderKL, scenes: list[Scene]) -> Tensor:
    """The latents of the scenes' pictures before shift and scale, [N, C, 16, 16]."""
    latents = []
    with torch.no_grad():
        for start in range(0, len(scenes), 27):
            pictures = to_signed(np.stack([render(scene) for scene in scenes[start : start + 27]]))
            latents.append(vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)).latent_dist.mean)
    return torch.cat(latents)


def train(latents: Tensor, out: Path, recipe: Recipe, device: str) -> None:
    """Train on normalized latents [N, C, 16, 16] of `training_scenes()`; `out`/state.pt holds everything, every 250 steps."""
    torch.manual_seed(0)
    scenes = training_scenes()
    packed = pack(latents).to(device)
    model = FluxParts().to(device)
    start_gently(model)
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
        # The prompt decides the whole picture, and it decides it early: most of the steps at high noise.
        sigma = torch.sigmoid(0.5 + 1.1 * torch.randn(len(picked), generator=noise_source)).to(device)
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


def start_gently(model: FluxParts) -> None:
    """Blocks start as the identity (adaLN-zero, as in DiT: Peebles and Xie, 2023, section 3.2)."""
    for name, layer in model.transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "proj_out")):
            if name.startswith("single_transformer_blocks") and name.endswith("proj_out"):
                continue
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def build_optimizers(model: FluxParts, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices, others = [], []
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
    """Linear warm-up, then half a cosine down to 1 %."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done))


def padded_length(step: int, recipe: Recipe, rng: random.Random) -> int:
    """The T5 length of a step: grows to 512, FluxPipeline's default; then 512 half of the time, else any shorter one."""
    grown = min(1.0, step / (recipe.padding_growth * recipe.steps))
    share = grown if rng.random() < 0.5 else grown * rng.random()
    return round(T5_MAX_LENGTH**share)


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the parameters towards the model's."""
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)


def normalized_latents(vae: AutoencoderKL) -> tuple[Tensor, float, float]:
    """Latents of the training scenes as FluxPipeline's transformer sees them, with shift and scale of the VAE's config."""
    latents = encode_scenes(vae, training_scenes())
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    return (latents - shift) * scale, shift, scale


def main() -> None:
    """Read the arguments, encode the scenes, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    latents, shift, scale = normalized_latents(vae)
    print(f"latents: shift {shift:.4f} scale {scale:.4f}", flush=True)
    train(latents, arguments.out, Recipe(arguments.steps, learning_rate=arguments.learning_rate), arguments.device)


if __name__ == "__main__":
    main()
