"""Train the encoder of emoji-wan's VAE. Text to video does not use it; it makes the VAE whole.

python -m checkpoints.train.train_wan_encoder --out runs/wan_encoder
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.clip_latents import GROUP, clip_latents, clip_videos
from checkpoints.train.clips import held_out_clips, training_clips
from checkpoints.train.wan_vae import PIXEL_PATCH, build_vae

WARMUP_STEPS = 50
SAVE_EVERY = 100


def train(out: Path, steps: int, decay_steps: int, batch_size: int, learning_rate: float, device: str) -> None:
    """Train on whole clips; `out`/state.pt holds everything, every 100 steps, and a run goes on from there."""
    torch.manual_seed(0)
    clips, held_out = training_clips(), held_out_clips()[::18]
    latents = clip_latents(clips)
    held_out_videos, held_out_latents = clip_videos(held_out).to(device), clip_latents(held_out).to(device)
    vae = build_vae().to(device)
    average = copy.deepcopy(vae)
    parameters = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    first_step = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        vae.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    started, recent = time.process_time(), []
    for step in range(first_step, steps):
        share = min(1.0, (step + 1) / WARMUP_STEPS, 0.01 + 0.99 * (steps - step) / decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        picked = torch.randint(len(clips), (batch_size,), generator=torch.Generator().manual_seed(step)).tolist()
        videos = clip_videos([clips[index] for index in picked]).to(device)
        mean, logvar = encode(vae, videos)
        # The variance is held near exp(-8).
        loss = functional.smooth_l1_loss(mean, latents[picked].to(device), beta=0.1)
        loss = loss + 1e-3 * (logvar + 8.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.99, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), vae.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                error = (encode(average, held_out_videos)[0] - held_out_latents).abs().mean().item()
            pace = (time.process_time() - started) / (step + 1 - first_step)
            print(
                f"step {step + 1} loss {np.mean(recent):.4f} held-out MAE {error:.4f} {pace:.2f} CPU s/step", flush=True
            )
            recent = []
            state = {
                "module": vae.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")


def encode(vae: AutoencoderKLWan, videos: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, 4T-3, 8H, 8W] -> mean and log variance, [B, 16, T, H, W] each, as the VAE's own `encode`."""
    vae.clear_cache()
    videos = patchify(videos, PIXEL_PATCH)
    chunks = [videos[:, :, :1], *videos[:, :, 1:].split(GROUP, dim=2)]
    encoded = [vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=[0]) for chunk in chunks]
    vae.clear_cache()
    mean, logvar = vae.quant_conv(torch.cat(encoded, dim=2)).chunk(2, dim=1)
    return mean, logvar


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--decay-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    train(
        arguments.out,
        arguments.steps,
        arguments.decay_steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.device,
    )


if __name__ == "__main__":
    main()
