"""Teach the text encoders which noun, colour and size a prompt asks for, before the transformer trains with them.

    python -m checkpoints.train.train_text --out runs/text.pt

An untrained CLIP answers nearly the same for every prompt, and a transformer that starts from it waits long for the
words. This takes a minute.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.flux_parts import TEXT_WIDTH, FluxParts
from checkpoints.train.pictures import COLOURS, NOUNS, SIZES, Scene, training_scenes
from checkpoints.train.prompts import random_prompt
from checkpoints.train.tokenizers import T5_MAX_LENGTH

BATCH_SIZE = 96


def train(out: Path, steps: int, learning_rate: float) -> None:
    """Train both encoders from scratch and save their weights to `out`."""
    torch.manual_seed(0)
    model = FluxParts()
    heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, len(NOUNS) + len(COLOURS) + len(SIZES)) for _ in range(2)])
    trained = [*model.clip.parameters(), *model.t5.parameters(), *heads.parameters()]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scenes = training_scenes()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 30, 0.05 + 1.5 * (1.0 - step / steps))
        rng = random.Random(f"text {step}")
        picked = [rng.choice(scenes) for _ in range(BATCH_SIZE)]
        padded_length = round(T5_MAX_LENGTH ** min(1.0, 1.5 * step / steps))
        text = model.encode([random_prompt(scene, rng) for scene in picked], padded_length)
        t5_mean = (text.tokens * (text.key_bias == 0.0)[..., None]).sum(1) / (text.key_bias == 0.0).sum(1, keepdim=True)
        answers = [heads[0](text.pooled), heads[1](t5_mean)]
        losses = [_loss(answer, picked) for answer in answers]
        optimizer.zero_grad()
        sum(losses, start=torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 49:
            right = [_share_right(answer, picked) for answer in answers]
            print(f"step {step + 1} all three right: CLIP {right[0]:.2f} T5 {right[1]:.2f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"clip": model.clip.state_dict(), "t5": model.t5.state_dict()}, out)


def _split(answer: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = answer.split([len(NOUNS), len(COLOURS), len(SIZES)], dim=1)
    return parts


def _labels(picked: list[Scene]) -> tuple[Tensor, ...]:
    nouns, colours, sizes = list(NOUNS), list(COLOURS), list(SIZES)
    return (
        torch.tensor([nouns.index(scene.noun) for scene in picked]),
        torch.tensor([colours.index(scene.colour) for scene in picked]),
        torch.tensor([sizes.index(scene.size) for scene in picked]),
    )


def _loss(answer: Tensor, picked: list[Scene]) -> Tensor:
    parts = [functional.cross_entropy(a, b) for a, b in zip(_split(answer), _labels(picked), strict=True)]
    return torch.stack(parts).sum()


def _share_right(answer: Tensor, picked: list[Scene]) -> float:
    right = [a.argmax(1) == b for a, b in zip(_split(answer), _labels(picked), strict=True)]
    return torch.stack(right).all(0).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.learning_rate)
