"""The sequence of a denoiser split over ranks, by diffusers' context parallelism and the plan of the model's class.

`enable_parallelism` itself makes its mesh of accelerators only; the same is set up here with a mesh of the group's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.context_parallel import (
    ContextParallelGatherHook,
    ContextParallelSplitHook,
    _get_submodule_by_name,
    apply_context_parallel,
)
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.distributed.device_mesh import DeviceMesh

from deployments.ranks.sequence.masks import mend_masks
from deployments.ranks.sequence.plans import plan_of
from deployments.ranks.sequence.uneven import gather_uneven_parts

WITHOUT_SUMS = ("native", "_native_npu")  # attention that splits, but returns no log-sum-exp, which ring needs


class SplitByContext:
    """One module whose sequence is split. Its ranks must make its forwards at the same time."""

    holds_all = True

    def __init__(
        self, module: torch.nn.Module, ulysses: int, ring: int, mesh: DeviceMesh, device: torch.device
    ) -> None:
        """`mesh`: of the ranks that compute a sample, with the dimensions ring and ulysses."""
        self._config = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
        self._parallel = ParallelConfig(context_parallel_config=self._config)
        self._parallel.setup(int(mesh.get_local_rank("ulysses")), mesh.size(), device, mesh=mesh)
        self._module = module
        gather_uneven_parts()
        mend_masks()
        apply_context_parallel(module, self._config, dict(plan_of(module) or {}))
        for processor in _processors(module):
            processor._parallel_config = self._parallel

    def set_uneven(self, uneven: bool) -> None:
        """Whether lengths that the ranks do not divide are split too, which costs a question before each attention."""
        self._config.ulysses_anything = uneven and self._config.ulysses_degree > 1
        self._config.ring_anything = uneven and self._config.ring_degree > 1

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Meanwhile a rank computes the module's forwards alone."""
        processors = [each for each in _processors(self._module) if each._parallel_config is self._parallel]
        hooks = list(_hooks(self._module))
        plans = [hook.metadata for hook in hooks]
        try:
            for processor in processors:
                processor._parallel_config = None
            for hook in hooks:
                hook.metadata = {} if isinstance(hook, ContextParallelSplitHook) else [None] * len(hook.metadata)
            yield
        finally:
            for hook, plan in zip(hooks, plans, strict=True):
                hook.metadata = plan
            for processor in processors:
                processor._parallel_config = self._parallel


def context_problem(module: torch.nn.Module, degree: int) -> str | None:
    """Why the sequence of the module cannot be split over so many ranks; None: it can."""
    plan = plan_of(module)
    if plan is None:
        return f"{type(module).__name__} has no plan for it in diffusers"
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if isinstance(heads, int) and heads % degree:
        return f"{degree} does not divide the {heads} attention heads of {type(module).__name__}"
    for part in plan:
        try:
            _get_submodule_by_name(module, part)
        except ValueError as error:
            return f"the plan of {type(module).__name__} in diffusers does not fit it: {error}"
    for backend in _backends(module):
        if backend not in _AttentionBackendRegistry._supports_context_parallel:
            allowed = ", ".join(sorted(_AttentionBackendRegistry._supports_context_parallel))
            return f"its attention is {backend!r}, which cannot be split; allowed: {allowed}"
    return None


def ring_problem(module: torch.nn.Module, degree: int) -> str | None:
    """Why its attention cannot go around; None: it can."""
    if plan_of(module) is None:
        return f"{type(module).__name__} has no plan for it in diffusers"
    for backend in _backends(module):
        if backend in WITHOUT_SUMS:
            return (
                f"its attention is {backend!r}, which does not return the log-sum-exp that ring needs: take ulysses, "
                "or a kernel that does, such as SGLANG_DIFFUSION_ATTENTION_BACKEND=fa"
            )
    return context_problem(module, 1)


def _processors(module: torch.nn.Module) -> Iterator[Any]:
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if hasattr(processor, "_parallel_config"):
            yield processor


def _backends(module: torch.nn.Module) -> list[str]:
    """The names of those in use, each once."""
    usual, _ = _AttentionBackendRegistry.get_active_backend()
    found = (getattr(each, "_attention_backend", None) or usual for each in _processors(module))
    return list(dict.fromkeys(str(getattr(each, "value", each)) for each in found))


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if isinstance(hook, ContextParallelSplitHook | ContextParallelGatherHook):
                yield hook
