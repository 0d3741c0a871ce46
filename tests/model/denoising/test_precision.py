"""A denoiser whose weights are held in few bits merges, checkpoints and resumes as any other."""

import importlib.util
import pickle
from pathlib import Path

import pytest

from deployments.errors import CannotResumeError
from tests.support.engine_parity import Stages, assert_same_bits, deviation

MERGED_DEVIATION = 2e-5  # of the largest value, in float32
TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SCHEMES = ["layerwise", pytest.param("int8", marks=TORCHAO)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_merges_and_resumes_with_its_own_bits(scheme: str, flux_checkpoint: Path) -> None:
    first, second = (Stages(flux_checkpoint, precision=scheme) for _ in range(2))
    whole = Stages(flux_checkpoint)
    try:
        requests = [first.request(index, deterministic=True) for index in range(2)]
        made = [first.alone(request) for request in requests]
        for request, (numbers, _) in zip(requests, made, strict=True):
            assert_same_bits(numbers, first.plain(request))
        truth, checkpoints = made[0]
        assert 0 < deviation(truth, whole.plain(requests[0])) < 0.2, "it is another model, and nearly the same"

        half = pickle.loads(pickle.dumps(checkpoints[len(checkpoints) // 2]))
        inputs, denoising = second.denoiser.denoise(requests[0], second.encode(requests[0]), half)
        assert_same_bits(second.numbers(inputs), truth)
        assert denoising.session.resumed_at > 0
        with pytest.raises(CannotResumeError):
            whole.denoiser.denoise(requests[0], whole.encode(requests[0]), half)

        merging = [first.request(index, deterministic=False) for index in range(2)]
        first.together(merging)
        first.denoiser.engine.statistics.batch_sizes.clear()
        for numbers, (alone, _) in zip(first.together(merging), made, strict=True):
            assert deviation(numbers, alone) <= MERGED_DEVIATION
        assert any(size > 1 for size in first.denoiser.engine.statistics.batch_sizes)
    finally:
        for stages in (first, second, whole):
            stages.close()
