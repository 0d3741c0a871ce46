"""Tiny pipelines that rewire their denoiser for a request, in stages of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployments.messages import GenerationRequest, OutputFormat
from tests.support.stage_parity import assert_same
from tests.support.three_stages import ThreeStages
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit

KEEPS_A_STATE = ("sd15_sag", "sd15_attend")
OpenStages = Callable[[str], ThreeStages]


@contextmanager
def opened_stages(checkpoints_root: Path) -> Iterator[OpenStages]:
    """Those of each model are opened once."""
    opened: dict[str, ThreeStages] = {}

    def open_stages(name: str) -> ThreeStages:
        if name not in opened:
            opened[name] = ThreeStages(checkpoint(name, checkpoints_root))
        return opened[name]

    yield open_stages
    for stages in opened.values():
        stages.close()


def request(name: str, index: int = 0, **arguments: Any) -> GenerationRequest:
    changed = {**request_arguments(name), **arguments}
    return GenerationRequest(f"r{index}", name, changed, index, OutputFormat("image", "png"), deterministic=True)


def truth(asked: GenerationRequest, checkpoints_root: Path) -> list[Any]:
    return run_unsplit(checkpoint(asked.model, checkpoints_root), asked.arguments, asked.seed)


def check_bytes(name: str, stages: ThreeStages, checkpoints_root: Path) -> None:
    """Those of the unsplit pipeline; the denoiser is left as it was."""
    [denoiser] = [stages.held["denoiser"].components[n] for n in stages.held["denoiser"].layout.denoisers]
    before = wiring(denoiser)
    asked = request(name)
    assert_same(stages.make(asked), truth(asked, checkpoints_root))
    assert wiring(denoiser) == before
    assert stages.denoiser.needs_remote_calls(asked) == (name in KEEPS_A_STATE)
    [summary] = list(stages.denoiser.recent_summaries["rewiring"])[-1:]
    assert min(value for key, value in summary.items() if key != "request_id") > 0


def check_resume(name: str, stages: ThreeStages, checkpoints_root: Path) -> None:
    """Elsewhere, with the same bytes."""
    asked = request(name)
    made, checkpoints = stages.make_and_save(asked)
    elsewhere = ThreeStages(checkpoint(name, checkpoints_root))
    assert_same(elsewhere.make(asked, checkpoints[len(checkpoints) // 2]), made)
    elsewhere.close()


def wiring(module: torch.nn.Module) -> list[Any]:
    return [(part, vars(part).get("processor"), list(part._forward_hooks)) for part in module.modules()]
