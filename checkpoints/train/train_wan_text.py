"""Teach emoji-wan's text encoder which noun, direction and colour a prompt asks for, before the transformer trains.

    python -m checkpoints.train.train_wan_text --out runs/wan_text.pt

This takes a minute.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.train.clip_prompts import random_prompt
from checkpoints.train.clips import DIRECTIONS, Clip, training_clips
from checkpoints.train.pictures import COLOURS, NOUNS
from checkpoints.train.wan_parts import TEXT_WIDTH, WanParts

BATCH_SIZE = 96
CHOICES = [list(NOUNS), list(DIRECTIONS), list(COLOURS)]


def train(out: Path, steps: int, learning_rate: float) -> None:
    """Train the encoder from scratch and save its weights to `out`."""
    torch.manual_seed(0)
    model = WanParts()
    head = nn.Linear(TEXT_WIDTH, sum(len(choices) for choices in CHOICES))
    trained = [*model.text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    clips = training_clips()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 30, 0.05 + 1.5 * (1.0 - step / steps))
        rng = random.Random(f"clip text {step}")
        picked = [rng.choice(clips) for _ in range(BATCH_SIZE)]
        text = model.encode([random_prompt(clip, rng) for clip in picked], padded_length=1)
        real = (text.key_bias == 0.0)[..., None]
        real[:, -1] = False  # the padding
        answers = head((text.tokens * real).sum(1) / real.sum(1)).split([len(choices) for choices in CHOICES], dim=1)
        labels = _labels(picked)
        losses = [functional.cross_entropy(answer, label) for answer, label in zip(answers, labels, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 49:
            right = [answer.argmax(1) == label for answer, label in zip(answers, labels, strict=True)]
            print(f"step {step + 1} all three right: {torch.stack(right).all(0).float().mean():.2f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.text_encoder.state_dict(), out)


def _labels(picked: list[Clip]) -> list[Tensor]:
    wanted = [(clip.noun, clip.direction, clip.colour) for clip in picked]
    return [torch.tensor([choices.index(words[place]) for words in wanted]) for place, choices in enumerate(CHOICES)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.learning_rate)
