"""What it costs to send a forward to another rank, against the forward: `python -m benchmarks.ranks`.

Two processes of one machine by gloo, one thread of arithmetic each. One of two samples is sent and its output comes
back, with a module that computes nothing; the forward is that of one sample in a transformer of `benchmarks.engine`.
The fastest of the rounds, both in turns: the machine may have other work.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmarks import report
from benchmarks.engine import LARGE, SMALL, TEXT_TOKENS, Size
from deployments.engine.batching.axes import BatchAxes
from deployments.ranks.channel import message_of
from deployments.ranks.executor import RanksExecutor
from tests.support.ranks import modules_on_ranks
from tests.support.tiny_models.flux import TRANSFORMER

TOKENS = (16, 256, 961)
PER_SAMPLE = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
AXES = BatchAxes({(name,): 0 for name in PER_SAMPLE}, {(0,): 0})


class Echo(torch.nn.Module):
    """Returns at once what has the shape of a denoiser's output."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (hidden_states,)


def transformer(size: Size) -> FluxTransformer2DModel:
    head = size.hidden // size.heads
    changes = {
        "num_attention_heads": size.heads,
        "attention_head_dim": head,
        "num_layers": size.num_layers,
        "num_single_layers": size.num_single_layers,
        "axes_dims_rope": [head // 4, head // 4, head // 2],
    }
    return FluxTransformer2DModel(**(TRANSFORMER | changes)).eval()


def arguments(config: Any, samples: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(samples, tokens, config.in_channels),
        "encoder_hidden_states": torch.zeros(samples, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.zeros(samples, config.pooled_projection_dim),
        "timestep": torch.ones(samples),
        "guidance": torch.ones(samples),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }


def milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


@torch.no_grad()
def row(executor: RanksExecutor, size: Size, module: FluxTransformer2DModel, tokens: int, rounds: int) -> list[str]:
    echo, sends, forwards = executor._modules["echo"], [], []
    one, two = arguments(module.config, 1, tokens), arguments(module.config, 2, tokens)
    executor.run("echo", echo, None, two)  # the first of its kind is made by one process too
    for _ in range(rounds):
        sends.append(milliseconds(lambda: executor.run("echo", echo, None, two)))
        forwards.append(milliseconds(lambda: module(**one)))
    send, forward = min(sends), min(forwards)
    kilobytes = sum(part.numel() for part in message_of(one).parts) / 1e3
    told = [f"{kilobytes:.0f}", f"{send:.1f}", f"{forward:.1f}", f"{send / forward:.2f}"]
    return [size.name, str(tokens + TEXT_TOKENS), *told]


def rows(rounds: int) -> list[list[str]]:
    with modules_on_ranks({"echo": Echo}, AXES, batch=2) as (_, executor):
        return [
            row(executor, size, module, tokens, rounds)
            for size in (SMALL, LARGE)
            for module in [transformer(size)]
            for tokens in TOKENS
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    heads = ["model", "tokens", "sent, kB", "sending, ms", "forward, ms", "ratio"]
    torch.set_num_threads(1)
    print("\n".join(report.table(heads, rows(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
