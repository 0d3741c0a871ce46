"""Train the small picture VAE (diffusers' AutoencoderKL, 128x128x3 <-> 16x16x8) on the training scenes.

    python -m checkpoints.train.train_vae --out runs/vae --steps 7000
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from checkpoints.train.pictures import held_out_scenes, render, to_signed, training_scenes

KL_WEIGHT = 5e-4  # per latent element, against a loss per pixel: gives a latent noise the decoder learns to ignore
EDGE_WEIGHT = 0.5  # weight of the differences between neighbouring pixels: without it small emoji come out soft


def build_vae() -> AutoencoderKL:
    """The untrained VAE; eight times smaller latents, eight channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def picture_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of pixels and of neighbouring pixels' differences; [B, 3, H, W] both."""
    pixels = (decoded - target).abs().mean()
    down = (decoded.diff(dim=2) - target.diff(dim=2)).abs().mean()
    right = (decoded.diff(dim=3) - target.diff(dim=3)).abs().mean()
    return pixels + EDGE_WEIGHT * (down + right)


def train(out: Path, steps: int, batch_size: int, learning_rate: float, device: str) -> None:
    """Train from scratch or from `out`'s last saved state; writes `out`/state.pt every 250 steps, then the VAE folder."""
    torch.manual_seed(0)
    pictures = np.stack([render(scene) for scene in training_scenes()])
    held_out = torch.from_numpy(to_signed(np.stack([render(s) for s in held_out_scenes()[::6]]))).permute(0, 3, 1, 2)
    vae = build_vae().to(device)
    average = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    first_step = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        for part, name in ((vae, "vae"), (average, "average"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        first_step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    for step in range(first_step, steps):
        picked = np.random.default_rng(step).integers(0, len(pictures), batch_size)
        target = torch.from_numpy(to_signed(pictures[picked])).permute(0, 3, 1, 2).contiguous().to(device)
        with torch.autocast(device, torch.bfloat16):  # half the time of float32, here and on a GPU
            posterior = vae.encode(target).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).mean()
        loss = picture_loss(decoded.float(), target) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), vae.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                error = functional.l1_loss(average.decode(average.encode(held_out.to(device)).latent_dist.mean).sample.cpu(), held_out)
            print(f"step {step + 1} loss {loss.item():.4f} kl {kl.item():.2f} held-out MAE {error.item():.4f} "
                  f"latent std {mean.std().item():.2f} noise {(0.5 * logvar).exp().mean().item():.2f} "
                  f"{(time.time() - started) / (step + 1 - first_step):.2f} s/step", flush=True)
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "step": step + 1}
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")
    average.save_pretrained(out / "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.device)
