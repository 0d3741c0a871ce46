"""Guidance passes as one batch: every family that makes them one after the other, and what a request adds to them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.adapters.use import AdapterUse
from tests.support.adapters import AdaptersHere, lora_for
from tests.support.engine_parity import (
    CACHE_DIT,
    CACHED_STEPS,
    MERGED_DEVIATION,
    Stages,
    assert_same_bits,
    deviation,
)
from tests.support.passes_parity import CORE, TOGETHER, TWO_PASSES, assert_resumes, check_passes, count, with_other
from tests.support.tiny_models import checkpoint

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", [name for name in TWO_PASSES if name not in CORE])
def test_passes_of_a_step_share_a_batch_deviate_little_and_resume_from_any_step_with_the_same_bytes(
    name: str, checkpoints_root: Path
) -> None:
    check_passes(name, checkpoints_root)


def test_passes_of_several_requests_share_batches_and_each_gets_its_own(checkpoints_root: Path) -> None:
    stages = Stages(checkpoint("wan22", checkpoints_root), guidance_passes="together")
    requests = [stages.request(index, deterministic=False) for index in range(3)]
    truths = [stages.plain(request) for request in requests]
    stages.together(requests)
    sizes = stages.denoiser.engine.statistics.batch_sizes
    sizes.clear()
    for numbers, truth in zip(stages.together(requests), truths, strict=True):
        assert deviation(numbers, truth) <= MERGED_DEVIATION
    assert max(sizes) >= 4
    stages.close()


def test_passes_with_a_lora_share_a_batch(checkpoints_root: Path) -> None:
    stages = Stages(checkpoint("flux_truecfg", checkpoints_root), **TOGETHER)
    files = {"a": {"transformer": lora_for(stages.stage.components["transformer"], 0)}}
    stages.close()
    stages.denoiser = with_other(stages, adapters=AdaptersHere(stages.stage.components, files))
    loras = {"loras": [AdapterUse("a", "a", scale=0.7).plain()]}
    request = replace(stages.request(0, deterministic=True), features=loras)
    truth, _ = stages.alone(request)
    assert deviation(truth, stages.alone(replace(request, features={}))[0]) > 1e-3
    first, _ = stages.alone(replace(request, deterministic=False))
    counted = count(stages, replace(request, deterministic=False), first)
    assert deviation(first, truth) <= MERGED_DEVIATION
    assert (counted.forwards, counted.turns) == (8, 5)
    stages.close()


def test_under_cache_dit_each_pass_has_a_cache_of_its_own_and_runs_apart(checkpoints_root: Path) -> None:
    stages = Stages(checkpoint("qwenimage", checkpoints_root), CACHE_DIT, **TOGETHER)
    request = stages.request(0, deterministic=True, steps=CACHED_STEPS)
    truth, _ = stages.alone(request)
    together, checkpoints = stages.alone(replace(request, deterministic=False))
    assert_same_bits(together, truth)
    assert stages.denoiser.engine.statistics.passes_together == 0
    assert_resumes(stages, replace(request, deterministic=False), truth, checkpoints[::4])
    stages.close()


def test_passes_come_together_while_requests_come_and_go(checkpoints_root: Path) -> None:
    """By measured costs: whatever is decided, each request gets its own."""
    stages = Stages(checkpoint("flux_truecfg", checkpoints_root), guidance_passes="auto", merging="auto")
    requests = [stages.request(index % 3, deterministic=False, steps=6) for index in range(8)]
    requests = [replace(request, request_id=f"r{index}") for index, request in enumerate(requests)]
    truths = [stages.plain(request) for request in requests[:3]]
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda request: stages.alone(request)[0], requests))
    for index, numbers in enumerate(made):
        assert deviation(numbers, truths[index % 3]) <= MERGED_DEVIATION
    stages.close()
