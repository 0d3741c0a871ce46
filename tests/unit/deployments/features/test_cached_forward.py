"""What shows that cache-dit cannot run a call, and what says nothing of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.features.cache_dit.forward import CachedForward, Contexts
from deployments.features.cache_dit.plan import cache_plan
from tests.support.stage_modules import env

CALL = torch.zeros(1, 2)


def cached_forward(error: Exception) -> CachedForward:
    """One whose cached form raises."""

    def cached(*_: Any) -> Any:
        raise error

    manager = SimpleNamespace(_cached_context_manager={}, _current_context=None)
    forward = CachedForward(lambda x: x + 1, cached, [], manager, ["blocks"], [1])
    forward.contexts = Contexts(cache_plan(env(CACHE_DIT_ENABLED="1"), 28, None, False))
    return forward


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: str(error)[:25],
)
def test_a_lack_of_memory_is_raised_and_the_next_request_is_cached_all_the_same(error: Exception) -> None:
    forward = cached_forward(error)
    with pytest.raises(type(error)):
        forward(CALL)
    assert forward.obstacles == {}


def test_a_call_that_cache_dit_does_not_know_runs_uncached_from_then_on() -> None:
    forward = cached_forward(TypeError("an unexpected argument"))
    assert torch.equal(forward(CALL), CALL + 1)
    assert "cache-dit cannot run this call" in str(next(iter(forward.obstacles.values())))
