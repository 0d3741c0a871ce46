"""Samples that ranks have made are held against what a portion of them deviates by alone."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.ranks.trial import wrong_portion

AXES = BatchAxes({("x",): 0}, {(): 0})
SIZES = [1, 1, 1]
WHOLE = torch.ones(3, 100)


def portions(*deviations: float) -> torch.Tensor:
    return torch.stack([row * (1 + apart) for row, apart in zip(WHOLE, deviations, strict=True)])


@pytest.mark.parametrize(
    ("deviations", "own", "problem"),
    [
        ((0, 0, 0), 0, None),
        ((2e-5, 5e-5, 0), 0, None),  # within the noise of the first
        ((0, 5e-5, 0), 4e-5, None),  # within its own
        ((0, 0, 5e-5), 0, "portion 2 deviates by 5.0e-05, where rank 0's deviates by 0.0e"),
        ((2e-5, 9e-4, 0), 2e-5, "portion 1 deviates by 9.0e-04"),  # the cap alone would let it pass
        ((2e-3, 0, 0), 0, "its portion alone deviates by 2.0e-03"),  # a wrong axis, which no noise excuses
        ((9e-4, 2e-3, 0), 9e-4, "portion 1"),
    ],
)
def test_a_portion_may_deviate_as_rounding_does(deviations: tuple[float, ...], own: float, problem: str | None) -> None:
    found = wrong_portion(portions(*deviations), WHOLE, SIZES, AXES, lambda index: WHOLE[index : index + 1] * (1 + own))
    assert (problem is None and found is None) or (problem is not None and found is not None and problem in found)
