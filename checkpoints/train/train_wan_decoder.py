r"""Train the first level of the decoder of emoji-wan's VAE; the rest of it is worked out (wan_decoder).

    python -m checkpoints.train.train_wan_decoder --out runs/wan_decoder
    python -m checkpoints.train.train_wan_decoder --base runs/wan_decoder --samples runs/wan_samples.pt \
        --out runs/wan_decoder_2 --steps 800 --decay-steps 700 --learning-rate 1e-3

It takes noise out of latents, and adds the finer principal components that they do not hold: which those are can be
told from the coarse ones, as there are only so many emoji. This works on latent cells, before anything is enlarged, and
on each frame by itself, so a training takes a few minutes. The second command goes on with latents that the
transformers made of training prompts (sample_latents), whose errors are not just noise.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.clip_latents import (
    GROUP,
    MOTION,
    PICTURE_CHANNELS,
    PLACE,
    cell_patches,
    clip_latents,
    latent_basis,
)
from checkpoints.train.clips import Clip, held_out_clips, render_clip, training_clips
from checkpoints.train.pictures import to_signed
from checkpoints.train.sample_latents import chosen_clips
from checkpoints.train.wan_decoder import CELL_VALUES, SCALE, first_blocks, first_stream, set_decoder
from checkpoints.train.wan_vae import build_vae

LATENT_NOISE = 0.35  # at most; the transformers' latents will not be exact
WARMUP_STEPS = 50
SAVE_EVERY = 100


def train(
    out: Path,
    steps: int,
    decay_steps: int,
    batch_size: int,
    learning_rate: float,
    base: Path | None,
    samples: Path | None,
    device: str,
) -> None:
    """Train on single frames; `out`/state.pt holds everything, every 100 steps, and a run goes on from there.

    With `samples`, what sample_latents wrote, half of each batch is of those.
    """
    torch.manual_seed(0)
    latents, patches = (part.to(device) for part in frames_of(training_clips()))
    sampled = torch.load(samples).transpose(1, 2).flatten(0, 1).to(device) if samples else latents[:0]
    sampled_clean, sampled_patches = (part.to(device) for part in frames_of(chosen_clips()))
    held_out = tuple(part.to(device) for part in frames_of(held_out_clips()[::4]))
    vae = build_vae()
    set_decoder(vae)
    if base:
        vae.load_state_dict(torch.load(base / "state.pt")["average"])
    vae.to(device)
    average = copy.deepcopy(vae)
    parameters = first_level(vae)
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
        source = torch.Generator().manual_seed(step)
        num_sampled = batch_size // 2 if samples else 0
        picked = torch.randint(len(latents), (batch_size - num_sampled,), generator=source)
        clean, wanted = latents[picked], patches[picked]
        amount = LATENT_NOISE * torch.rand(len(clean), 1, 1, 1, generator=source)
        given = clean + (amount * torch.randn(clean.shape, generator=source)).to(device)
        if num_sampled:
            picked = torch.randint(len(sampled), (num_sampled,), generator=source)
            jitter = 0.05 * torch.randn(num_sampled, *clean.shape[1:], generator=source).to(device)
            given = torch.cat([given, sampled[picked] + jitter])
            clean, wanted = torch.cat([clean, sampled_clean[picked]]), torch.cat([wanted, sampled_patches[picked]])
        loss = cell_loss(vae, given, clean, wanted)
        optimizer.zero_grad()
        loss.backward()
        keep_fixed_channels(vae)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(first_level(average), parameters, strict=True):
                kept.lerp_(new, 1.0 - decay)
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                error = (cell_pixels(average, held_out[0])[0] - held_out[1]).abs().mean().item()
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


def frames_of(clips: list[Clip]) -> tuple[Tensor, Tensor]:
    """Latents [N, 16, 8, 8] of every latent frame of the clips, and the pixels of its cells [N, 8, 8, 192]."""
    latents = clip_latents(clips).transpose(1, 2).flatten(0, 1)
    frames = to_signed(np.stack([render_clip(clip)[::GROUP] for clip in clips]))
    return latents, cell_patches(torch.from_numpy(frames)).flatten(0, 1)


def first_level(vae: AutoencoderKLWan) -> list[nn.Parameter]:
    """The parameters that are trained."""
    modules = [vae.decoder.conv_in, *first_blocks(vae.decoder)]
    return [parameter for module in modules for parameter in module.parameters()]


def cell_loss(vae: AutoencoderKLWan, noisy: Tensor, clean: Tensor, patches: Tensor) -> Tensor:
    """Mean absolute difference of the cells' pixels, and a little for places and motions."""
    pixels, other = cell_pixels(vae, noisy)
    wanted = (
        clean[:, PICTURE_CHANNELS:] / torch.tensor([PLACE, PLACE, MOTION, MOTION], device=clean.device)[:, None, None]
    )
    return (pixels - patches).abs().mean() + 0.1 * functional.smooth_l1_loss(other, wanted, beta=0.1)


def cell_pixels(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 16, 8, 8] -> pixels [N, 8, 8, 192], and place (column, row) and motion (x, y) [N, 4, 8, 8]."""
    stream = first_stream(vae.decoder)
    values = run_first_level(vae, latents)
    mean, projection = latent_basis(CELL_VALUES)
    coefficients = values[:, :CELL_VALUES].movedim(1, -1) / SCALE
    pixels = coefficients @ torch.linalg.pinv(projection).to(latents.device) + mean.to(latents.device)
    other = [stream.place(1), stream.place(0), stream.motion(1), stream.motion(0)]
    return pixels, values[:, other]


def run_first_level(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What the decoder computes before it enlarges, for single frames: [N, 16, 8, 8] -> [N, 64, 8, 8].

    Its 3D convolutions are zero for earlier frames, which saves two thirds of the work.
    """
    hidden = _convolve(vae.decoder.conv_in, latents[:, :, None])
    for block in first_blocks(vae.decoder):
        added = _convolve(block.conv1, functional.silu(block.norm1(hidden)))
        hidden = hidden + _convolve(block.conv2, functional.silu(block.norm2(added)))
    return hidden[:, :, 0]


def keep_fixed_channels(vae: AutoencoderKLWan) -> None:
    """Take the gradients from the constant channel, from what is set between levels, and from earlier frames."""
    stream = first_stream(vae.decoder)
    fixed = [stream.constant, stream.motion_now(0), stream.motion_now(1)]
    for conv in [vae.decoder.conv_in, *(block.conv2 for block in first_blocks(vae.decoder))]:
        for gradient in (conv.weight.grad, conv.bias.grad):
            assert gradient is not None
            gradient[fixed] = 0.0


def _convolve(conv: nn.Conv3d, values: Tensor) -> Tensor:
    return functional.conv2d(values[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=1)[:, :, None]


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--base", type=Path, help="an earlier training to start from")
    parser.add_argument("--samples", type=Path, help="what sample_latents wrote")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    train(
        arguments.out,
        arguments.steps,
        arguments.decay_steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.base,
        arguments.samples,
        arguments.device,
    )


if __name__ == "__main__":
    main()
