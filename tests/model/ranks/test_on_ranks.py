"""Tiny models on ranks against one process: close, the same bytes each time, and the same again after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.errors import CannotResumeError
from deployments.messages import GenerationRequest
from tests.support.engine_parity import Stages, assert_same_bits, deviation
from tests.support.further import all_but
from tests.support.ranks import stages_on_ranks
from tests.support.tiny_models import checkpoint

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

DEVIATION = 2e-5  # of the largest value, in float32, after all steps
STEPS = 4

# model: the ways that it is split in
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "flux by ulysses": ("flux", {"ulysses": 2}),
    "flux by ulysses and batch": ("flux", {"ulysses": 2, "batch": 2}),
    **{
        f"{name} by ulysses": (name, {"ulysses": 2})
        for name in ("flux2", "qwen_image", "wan21", "wan22", "ltx", "ltx2", "helios", "chronoedit")
    },
    **{
        f"{name} by batch": (name, {"batch": 2})
        for name in ("sd15", "sdxl", "sd3", "pixart", "auraflow", "z_image", "lumina2", "cogview4", "hunyuan_video")
    },
}


def alone(folder: Path) -> tuple[GenerationRequest, list[torch.Tensor]]:
    """A request, and what one process makes of it: before the group is there, which the streamer of weights joins."""
    stages = Stages(folder)
    try:
        request = stages.request(0, deterministic=True, steps=STEPS)
        return request, stages.plain(request)
    finally:
        stages.close()


@pytest.mark.parametrize("case", all_but(["flux by ulysses"], CASES))
def test_ranks_make_what_one_process_makes(case: str, checkpoints_root: Path) -> None:
    name, parallel = CASES[case]
    folder = checkpoint(name, checkpoints_root)
    request, truth = alone(folder)
    with stages_on_ranks(folder, parallel) as stages:
        numbers, checkpoints = stages.alone(request)
        assert deviation(numbers, truth) <= DEVIATION
        again, _ = stages.alone(request)
        assert_same_bits(again, numbers)
        half = checkpoints[len(checkpoints) // 2]
        inputs, run = stages.denoiser.denoise(request, stages.encode(request), half)
        assert run.session.resumed_at == half.step
        assert_same_bits(stages.numbers(inputs), numbers)
        assert were_made_by_ranks(stages)
    elsewhere = Stages(folder)
    with pytest.raises(CannotResumeError):  # with another split the numbers are others
        elsewhere.denoiser.denoise(request, elsewhere.encode(request), half)
    elsewhere.close()


def were_made_by_ranks(stages: Stages) -> bool:
    executor: Any = stages.denoiser.engine.executor
    return any(way is not None for way in executor._ways.values())
