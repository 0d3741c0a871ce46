"""Train the halves of emoji-flux's VAE (diffusers' AutoencoderKL), each on its own: the latents are fixed beforehand.

python -m checkpoints.train.train_vae --half decoder --out runs/decoder
python -m checkpoints.train.train_vae --half encoder --out runs/encoder
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.latents import LATENT_CHANNELS, latents_of, scene_pictures
from checkpoints.train.pictures import held_out_scenes, training_scenes

EDGE_WEIGHT = 0.5  # weight of the differences between neighbouring pixels: without it small emoji come out soft
LATENT_NOISE = 0.25  # the decoder sees latents with up to this much noise: the transformer's will not be exact
WARMUP_STEPS = 100
SAVE_EVERY = 100

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]  # of half, pictures, latents


def build_vae() -> AutoencoderKL:
    """The untrained VAE; eight times smaller latents of 16 channels, used as they are (scale 1, shift 0)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
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


def decoder_loss(decoder: nn.Module, pictures: Tensor, latents: Tensor, source: torch.Generator) -> Tensor:
    """How far the decoder of slightly noisy latents is from the picture."""
    amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=source)
    noisy = latents + amount.to(latents.device) * torch.randn(latents.shape, generator=source).to(latents.device)
    with torch.autocast(latents.device.type, torch.bfloat16):  # half the time of float32, here and on a GPU
        decoded = decoder(noisy)
    return picture_loss(decoded.float(), pictures)


def encoder_loss(encoder: nn.Module, pictures: Tensor, latents: Tensor, source: torch.Generator) -> Tensor:
    """How far the encoder's mean is from the latents; its variance is held near exp(-8)."""
    with torch.autocast(latents.device.type, torch.bfloat16):
        mean, logvar = encoder(pictures).float().chunk(2, dim=1)
    loss: Tensor = functional.smooth_l1_loss(mean, latents, beta=0.1) + 1e-3 * (logvar + 8.0).square().mean()
    return loss


HALVES: dict[str, Loss] = {"decoder": decoder_loss, "encoder": encoder_loss}


def train(
    half: str, out: Path, steps: int, decay_steps: int, batch_size: int, learning_rate: float, device: str
) -> None:
    """Train one half; `out`/state.pt holds everything, every 100 steps, and a run goes on from there."""
    torch.manual_seed(0)
    pictures = scene_pictures(training_scenes())
    latents = latents_of(pictures)
    held_out_pictures = scene_pictures(held_out_scenes()[::6])
    held_out_latents = latents_of(held_out_pictures)
    module: nn.Module = getattr(build_vae(), half).to(device)
    average = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
    first_step = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    for step in range(first_step, steps):
        share = min(1.0, (step + 1) / WARMUP_STEPS, 0.01 + 0.99 * (steps - step) / decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        source = torch.Generator().manual_seed(step)
        picked = torch.randint(len(pictures), (batch_size,), generator=source)
        loss = HALVES[half](module, pictures[picked].to(device), latents[picked].to(device), source)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), module.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                given, wanted = held_out_pictures.to(device), held_out_latents.to(device)
                if half == "decoder":
                    given, wanted = wanted, given
                error = functional.l1_loss(average(given)[:, : wanted.shape[1]], wanted).item()
            pace = (time.time() - started) / (step + 1 - first_step)
            print(f"step {step + 1} loss {loss.item():.4f} held-out MAE {error:.4f} {pace:.2f} s/step", flush=True)
            state = {
                "module": module.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=sorted(HALVES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--decay-steps", type=int, default=1000, help="the last ones, with a falling learning rate")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    train(
        arguments.half,
        arguments.out,
        arguments.steps,
        arguments.decay_steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.device,
    )


if __name__ == "__main__":
    main()
