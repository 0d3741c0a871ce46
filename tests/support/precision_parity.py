"""A denoiser in few bits against itself: alone, merged, and resumed by a process that loaded it anew."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from deployments.errors import CannotResumeError
from tests.support.engine_parity import NEVER_MERGED, Stages, assert_same_bits, deviation

MERGED_DEVIATION = 2e-5  # of the largest value, in float32


def check_precision(folder: Path, scheme: str) -> None:
    first, second = (Stages(folder, precision=scheme) for _ in range(2))
    whole = Stages(folder)
    try:
        requests = [first.request(index, deterministic=True) for index in range(2)]
        made = [first.alone(request) for request in requests]
        for request, (numbers, _) in zip(requests, made, strict=True):
            assert_same_bits(numbers, first.plain(request))
        truth, checkpoints = made[0]
        assert deviation(truth, whole.plain(requests[0])) > 0, "it is another model"

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
        merged = any(size > 1 for size in first.denoiser.engine.statistics.batch_sizes)
        assert merged == (folder.name not in NEVER_MERGED)
    finally:
        for stages in (first, second, whole):
            stages.close()
