r"""Train emoji-wan's transformers (rectified flow, as Wan): first one for all noise levels, then each half from it.

    python -m checkpoints.train.train_wan --text runs/wan_text.pt --out runs/wan
    python -m checkpoints.train.train_wan --half high --base runs/wan --out runs/wan_high
    python -m checkpoints.train.train_wan --half low --base runs/wan --out runs/wan_low

Wan2.2 has a transformer for the noisy steps and another for the rest, and one text encoder: it is frozen in the halves.
"""

import argparse
import copy
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.clip_latents import clip_latents
from checkpoints.train.clip_prompts import plain_prompt, random_prompt
from checkpoints.train.clips import held_out_clips, training_clips
from checkpoints.train.wan_parts import WanParts, token_places

MAX_TEXT_LENGTH = 512  # WanPipeline's default
BOUNDARY = 0.9  # the sigma at which the second transformer takes over
SAVE_EVERY = 100
PLACE_BLOCK = 1  # the transformer block after which a token should know its place

# Of sigma's logit: mean and standard deviation. Below sigma 0.9 the noisy clip itself tells what it shows, and nothing
# is learned about the prompt.
SIGMAS: dict[str, tuple[float, float]] = {"all": (2.0, 1.3), "high": (3.6, 1.0), "low": (0.8, 1.0)}
# A half's reach a little over the boundary.
SIGMA_LIMITS = {"all": (0.0, 1.0), "high": (BOUNDARY - 0.02, 1.0), "low": (0.0, BOUNDARY + 0.02)}


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training."""

    half: str  # "all" noise levels, the "high" or the "low" ones
    steps: int
    decay_steps: int  # the last ones, with a falling learning rate
    learning_rate: float
    batch_size: int = 16
    warmup_steps: int = 30
    # Padding grows from none to 512 tokens: 500 padding tokens would drown the words of an untrained model.
    padding_growth_steps: int = 400
    place_steps: int = 400  # the first ones, which also teach tokens their places
    average_decay: float = 0.995


RECIPES = {
    "all": Recipe("all", steps=1300, decay_steps=1, learning_rate=2e-3),
    "high": Recipe("high", steps=400, decay_steps=240, learning_rate=1e-3),
    "low": Recipe("low", steps=440, decay_steps=320, learning_rate=1e-3),
}


def train(recipe: Recipe, model: WanParts, out: Path, device: str) -> None:
    """Train `model` on the training clips; `out`/state.pt holds everything; a run goes on from there."""
    clips = training_clips()
    latents = clip_latents(clips).to(device)
    model.to(device)
    average = copy.deepcopy(model)
    places = PlaceHead(model).to(device)
    optimizers = build_optimizers(model, places, recipe)
    first_step = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        places.load_state_dict(state["places"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    started, recent = time.process_time(), []
    for step in range(first_step, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe)
        rng = random.Random(f"clips {recipe.half} {step}")
        picked = [rng.randrange(len(clips)) for _ in range(recipe.batch_size)]
        prompts = [random_prompt(clips[index], rng) for index in picked]
        clean = latents[picked]
        noise_source = torch.Generator().manual_seed(step)
        noise = torch.randn(clean.shape, generator=noise_source).to(device)
        sigma = draw_sigma(recipe, noise_source).to(device)
        share = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1.0 - share) * clean + share * noise
        with torch.autocast(device, torch.bfloat16):
            velocity = model(noisy, sigma, prompts, padded_length(step, recipe, rng))
        loss = functional.mse_loss(velocity.float(), noise - clean)
        total = loss + 0.3 * places.loss() if recipe.half == "all" and step < recipe.place_steps else loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, min(recipe.average_decay, (step + 1) / (step + 20)))
        recent.append((loss.item(), (total - loss).item()))
        if step % 20 == 19:
            pace = (time.process_time() - started) / (step + 1 - first_step)
            flow, place = np.mean(recent, axis=0)
            print(f"step {step + 1} loss {flow:.4f} places {place:.3f} {pace:.2f} CPU s/step", flush=True)
            recent = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            print(f"step {step + 1} {held_out_figures(average, device)}", flush=True)
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "places": places.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")


class PlaceHead(nn.Module):
    """Names the latent frame, row and column of each token, from what a transformer block gives.

    Wan has rotary positions only, which are relative: at the highest noise a token can find out where it is only by
    looking for neighbours that are not there. A transformer asked for that learns it in 100 steps, and one that is not
    asked waits long for it.
    """

    def __init__(self, model: WanParts) -> None:
        super().__init__()
        self.places = token_places()
        self.counts = [int(place.max()) + 1 for place in self.places]
        self.head = nn.Linear(model.transformer.proj_out.in_features, sum(self.counts))
        self.tokens = torch.empty(0)
        model.transformer.blocks[PLACE_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: object, tokens: Tensor) -> None:
        self.tokens = tokens

    def loss(self) -> Tensor:
        """Mean cross entropy of the three answers, for the last batch that went through the transformer."""
        answers = self.head(self.tokens.float()).split(self.counts, dim=-1)
        losses = [
            functional.cross_entropy(answer.flatten(0, 1), place.to(answer.device).repeat(len(answer)))
            for answer, place in zip(answers, self.places, strict=True)
        ]
        return torch.stack(losses).mean()


def draw_sigma(recipe: Recipe, source: torch.Generator) -> Tensor:
    """Noise levels [B] in (0, 1)."""
    mean, deviation = SIGMAS[recipe.half]
    sigma = torch.sigmoid(mean + deviation * torch.randn(recipe.batch_size, generator=source))
    return sigma.clamp(*SIGMA_LIMITS[recipe.half])


def build_optimizers(model: WanParts, places: PlaceHead, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = list(places.parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_block = "transformer.blocks" in name and parameter.ndim == 2
            (matrices if in_block else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, then a linear fall to 2 %."""
    return min(1.0, (step + 1) / recipe.warmup_steps, 0.02 + 0.98 * (recipe.steps - step) / recipe.decay_steps)


def padded_length(step: int, recipe: Recipe, rng: random.Random) -> int:
    """The text length of a step: grows to 512, WanPipeline's default; then 512 half of the time, else a shorter one."""
    grown = min(1.0, step / recipe.padding_growth_steps) if recipe.half == "all" else 1.0
    share = grown if rng.random() < 0.5 else grown * rng.random()
    length: int = round(MAX_TEXT_LENGTH**share)
    return length


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the parameters towards the model's."""
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)


def held_out_figures(model: WanParts, device: str, count: int = 32) -> str:
    """How a clip guessed from pure noise compares with the right one, for held-out prompts.

    Noun and direction are right where no clip of another noun, or of another direction, has nearer latents.
    """
    wanted = random.Random("watched").sample(held_out_clips(), count)
    candidates = [clip for clip in training_clips() + held_out_clips() if clip.colour in {w.colour for w in wanted}]
    latents = clip_latents(candidates).to(device)
    noise = torch.randn(count, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
    sigma = torch.full((count,), 0.999, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        velocity = model(noise, sigma, [plain_prompt(clip) for clip in wanted], MAX_TEXT_LENGTH)
    guessed = noise - velocity.float()
    nearest = [candidates[int((latents - guess).square().flatten(1).mean(1).argmin())] for guess in guessed]
    error = (guessed - latents[[candidates.index(clip) for clip in wanted]]).square().mean().item()
    right = {
        part: np.mean([getattr(saw, part) == getattr(clip, part) for saw, clip in zip(nearest, wanted, strict=True)])
        for part in ("noun", "direction", "colour")
    }
    return f"held out: MSE {error:.4f}, " + ", ".join(f"{part} {share:.2f}" for part, share in right.items())


def load_base(base: Path) -> WanParts:
    """The averaged weights of a training over all noise levels, with the text encoder frozen."""
    model = WanParts()
    model.load_state_dict(torch.load(base / "state.pt", map_location="cpu")["average"])
    model.text_encoder.requires_grad_(False)
    return model


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=sorted(SIGMAS), default="all")
    parser.add_argument("--text", type=Path, help="what train_wan_text wrote, for all noise levels")
    parser.add_argument("--base", type=Path, help="the training over all noise levels, for a half")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if (arguments.half == "all") != (arguments.text is not None) or (arguments.half == "all") == bool(arguments.base):
        parser.error("all noise levels start from --text, a half from --base")
    torch.manual_seed(0)
    if arguments.half == "all":
        model = WanParts()
        model.text_encoder.load_state_dict(torch.load(arguments.text, map_location="cpu"))
    else:
        model = load_base(arguments.base)
    recipe = RECIPES[arguments.half]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    train(recipe, model, arguments.out, arguments.device)


if __name__ == "__main__":
    main()
