"""Models that only cache-dit has a plan for: on two ranks close to one process, and the same bytes each time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_parity import Stages, assert_same_bits, deviation
from tests.support.further import all_but
from tests.support.ranks import stages_on_ranks
from tests.support.tiny_models import checkpoint

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

DEVIATION = 2e-5  # of the largest value, in float32, after all steps
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A tiny model; `arguments` in place of its own, of lengths that two ranks divide."""

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    each.model: each
    for each in (
        Case("hunyuanvideo"),
        Case("hunyuan_image"),
        Case("cogvideox"),
        Case("cogview4"),
        Case("kandinsky5_t2i"),
        Case("skyreels_v2", {"height": 32, "width": 32}),
    )
}


@pytest.mark.parametrize("case", all_but(["cogview4"], CASES))
def test_two_ranks_make_what_one_process_makes(case: str, checkpoints_root: Path) -> None:
    folder = checkpoint(CASES[case].model, checkpoints_root)
    before = Stages(folder)
    request = before.request(0, deterministic=True, steps=STEPS)
    request.arguments.update(CASES[case].arguments)
    truth = before.plain(request)
    before.close()
    with stages_on_ranks(folder, {"ulysses": 2}) as stages:
        numbers, _ = stages.alone(request)
        print(f"{case}: {deviation(numbers, truth):.1e}")
        again, _ = stages.alone(request)
        executor: Any = stages.denoiser.engine.executor
        assert any(way is not None for way in executor._ways.values()), "rank 0 made all forwards alone"
        assert deviation(numbers, truth) <= DEVIATION
        assert_same_bits(again, numbers)
