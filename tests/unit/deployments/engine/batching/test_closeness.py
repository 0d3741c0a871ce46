"""How far a merged forward may be from the lone one: a few times the noise that was measured."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.batching.closeness import LARGEST, SMALLEST, bound, deviation, is_close, is_same


@given(st.integers(1, 4), st.floats(-100, 100, width=32))
def test_an_output_is_close_to_itself(size: int, value: float) -> None:
    lone = torch.full((size,), value)
    assert deviation(lone, lone) == 0
    assert is_close(lone, lone, 0.0)


@pytest.mark.parametrize(
    ("merged", "lone"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float16)),
        (torch.tensor([1.0, float("nan")]), torch.ones(2)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.ones(2), torch.zeros(2)),
    ],
    ids=["shape", "dtype", "nan", "integers", "of nothing"],
)
def test_what_differs_in_kind_is_infinitely_far(merged: torch.Tensor, lone: torch.Tensor) -> None:
    assert deviation(merged, lone) == math.inf
    assert not is_close(merged, lone, 1.0)


def test_nan_at_the_same_places_is_no_deviation() -> None:
    one, other = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])
    assert deviation(one, other) == 0
    assert is_same(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_error_of_one_percent_is_refused_where_the_noise_is_that_of_rounding(dtype: torch.dtype) -> None:
    lone = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = torch.finfo(dtype).eps / 4
    assert deviation(lone * 1.01, lone) == pytest.approx(0.01, rel=0.2)
    assert not is_close(lone * 1.01, lone, noise)
    assert is_close((lone.float() * (1 + noise)).to(dtype), lone, noise)


def test_the_bound_follows_the_noise_between_a_smallest_and_a_largest() -> None:
    lone = torch.ones(2, dtype=torch.bfloat16)
    assert bound(lone, 0.0) == SMALLEST[torch.bfloat16]
    assert bound(lone, 5e-3) == pytest.approx(1.5e-2)
    assert bound(lone, 1.0) == LARGEST[torch.bfloat16]
