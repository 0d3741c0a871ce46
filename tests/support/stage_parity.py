"""Three processes that hold one stage each make the same bytes as the unsplit pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.messages import GenerationRequest, OutputFormat
from tests.support.stage_processes import StageProcesses
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit

SEED = 0
ANY_OUTPUT = OutputFormat("image", "png")  # the comparison is made before files are written


def check_stages(name: str, stages: StageProcesses, checkpoints_root: Path) -> None:
    """Three stages make the bytes of the unsplit pipeline."""
    folder = checkpoint(name, checkpoints_root)
    arguments = request_arguments(name)
    truth = run_unsplit(folder, arguments, SEED)
    held = stages.load(folder)
    made = stages.generate(GenerationRequest("parity", name, arguments, SEED, ANY_OUTPUT))
    assert_same(made, truth)
    assert all(held["denoiser"]), "the denoiser's process holds the denoiser"
    assert not set(held["denoiser"]) & (set(held["encoder"]) | set(held["vae"])), "no weights are held twice"


def check_bfloat16(name: str, stages: StageProcesses, checkpoints_root: Path) -> None:
    """The same in bfloat16."""
    folder = checkpoint(name, checkpoints_root)
    arguments = request_arguments(name)
    truth = run_unsplit(folder, arguments, SEED, torch.bfloat16)
    stages.load(folder, "bfloat16")
    assert_same(stages.generate(GenerationRequest("parity", name, arguments, SEED, ANY_OUTPUT)), truth)


def assert_same(made: list[Any], truth: list[Any]) -> None:
    assert len(made) == len(truth)
    compared = 0
    for a, b in zip(made, truth, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.isfinite(b).all()
            assert torch.equal(a, b), f"differs by {(a - b).abs().max()}"
            compared += 1
        elif isinstance(b, np.ndarray | Image.Image):
            assert np.array_equal(np.asarray(a), np.asarray(b))
            compared += 1
        else:
            assert a == b or (a is None and b is None)
    assert compared, "the output holds pictures, frames or sound"
