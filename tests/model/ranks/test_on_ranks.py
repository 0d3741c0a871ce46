"""Tiny models on ranks against one process: close, the same bytes each time, and the same again after a resume."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is split; `arguments` in place of the model's own."""

    model: str
    parallel: dict[str, int]
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    "flux by ulysses": Case("flux", {"ulysses": 2}),
    "flux by ulysses and batch": Case("flux", {"ulysses": 2, "batch": 2}),
    "flux2 by ulysses": Case("flux2_dev", {"ulysses": 2}),
    "wan by ulysses": Case("wan21", {"ulysses": 2}, {"height": 32, "width": 32}),
    "wan with times of tokens by ulysses": Case("wan22_5b", {"ulysses": 2}),
    "qwen by ulysses": Case("qwenimage", {"ulysses": 3}),
    "ltx by ulysses and batch": Case("ltx", {"ulysses": 2, "batch": 2}),
    "ltx with a picture by four": Case("ltx_i2v", {"ulysses": 4}),
    "ltx2 by ulysses": Case("ltx2", {"ulysses": 2}),
    "sd15 by batch": Case("sd15", {"batch": 2}),
    "sdxl by batch": Case("sdxl", {"batch": 2}),
    "sd3 by batch": Case("sd3", {"batch": 2}),
    "zimage by batch": Case("zimage", {"batch": 2}),
    "pixart by batch": Case("pixart", {"batch": 2}),
}


def alone(folder: Path, arguments: dict[str, Any]) -> tuple[GenerationRequest, list[torch.Tensor]]:
    """A request, and what one process makes of it: before the group is there, which the streamer of weights joins."""
    stages = Stages(folder)
    try:
        request = stages.request(0, deterministic=True, steps=STEPS)
        request.arguments.update(arguments)
        return request, stages.plain(request)
    finally:
        stages.close()


@pytest.mark.parametrize("case", all_but(["flux by ulysses"], CASES))
def test_ranks_make_what_one_process_makes(case: str, checkpoints_root: Path) -> None:
    model, parallel, arguments = CASES[case].model, CASES[case].parallel, CASES[case].arguments
    folder = checkpoint(model, checkpoints_root)
    request, truth = alone(folder, arguments)
    with stages_on_ranks(folder, parallel) as stages:
        numbers, checkpoints = stages.alone(request)
        print(f"{case}: {deviation(numbers, truth):.1e}")
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


@pytest.mark.rest
def test_requests_that_share_a_batch_are_split_over_the_ranks(checkpoints_root: Path) -> None:
    folder = checkpoint("flux", checkpoints_root)
    before = Stages(folder)
    requests = [before.request(index, deterministic=False, steps=STEPS) for index in range(2)]
    truths = [before.plain(request) for request in requests]
    before.close()
    with stages_on_ranks(folder, {"batch": 2}) as stages:
        stages.together(requests)  # the first merge is verified, and the lone outputs are handed out
        for numbers, truth in zip(stages.together(requests), truths, strict=True):
            assert deviation(numbers, truth) <= DEVIATION
        executor: Any = stages.denoiser.engine.executor
        assert {kind[0][2] for kind, way in executor._ways.items() if way is not None} == {2}, "in two portions"
