"""The forward of a transformer that Cache-DiT may serve: cached with one request's contexts, or as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cache_dit.caching.cache_contexts.cache_context import CachedContext
from torch.utils._pytree import tree_leaves

from deployments.features.cache_dit.plan import CachePlan
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# A cached step would miss what the transformer does to any other object, such as a key/value cache.
PLAIN_ARGUMENTS = (torch.Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
FAILURES_OF_A_PATCH = (TypeError, AttributeError, ValueError, AssertionError, LookupError, RuntimeError)


@dataclass
class Contexts:
    """What one transformer remembers of one request: for each guidance pass, one context per list of blocks.

    A pipeline that runs its transformer more than once per step (classifier-free guidance in two passes)
    compares and reuses each of these passes on its own.
    """

    plan: CachePlan
    passes: dict[int, list[CachedContext]] = field(default_factory=dict)
    shapes: dict[int, str] = field(default_factory=dict)  # of the arguments of each pass
    obstacle: str | None = None  # why the rest of the request runs uncached


@dataclass(frozen=True)
class Patch:
    """A part of a transformer that cache-dit runs in a form of its own."""

    part: torch.nn.Module
    former: Callable[..., Any] | None  # the forward that was set on the part; None: its class's
    patched: Callable[..., Any]

    def apply(self) -> None:
        vars(self.part)["forward"] = self.patched

    def undo(self) -> None:
        if self.former is None:
            vars(self.part).pop("forward", None)
        else:
            vars(self.part)["forward"] = self.former


@dataclass
class CachedForward:
    """The forward of a prepared transformer: cached with the contexts in use, or exactly as it was.

    cache-dit rewrites the forward of some models and of their blocks, and its versions leave out what it did
    not foresee (ControlNet's residuals, new arguments). So the first call of every combination of arguments
    is run both ways, nothing reused, and compared: what differs is never cached.
    """

    original: Callable[..., Any]
    cached: Callable[..., Any]
    patches: list[Patch]
    manager: Any  # cache-dit's: holds the contexts that `cached` works with
    names: list[str]  # of the contexts: one for each list of blocks
    num_blocks: list[int]  # in each of these lists
    contexts: Contexts | None = None
    guidance_pass: int = 0
    is_patched: bool = True
    obstacles: dict[str, str | None] = field(default_factory=dict)  # by combination of arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        contexts = self.contexts
        if contexts is None or contexts.obstacle is not None:
            return self._run_original(args, kwargs)
        contexts.obstacle = self._find_obstacle(contexts, args, kwargs)
        if contexts.obstacle is not None:
            logger.warning("Cache-DiT: the rest of a request runs uncached: %s", contexts.obstacle)
            return self._run_original(args, kwargs)
        return self._run_cached(contexts.passes[self.guidance_pass], args, kwargs)

    def deactivate(self) -> None:
        """Run uncached from now on, and let go of the last request's tensors."""
        self.contexts = None
        self.manager._cached_context_manager = {}
        self.manager._current_context = None
        self._set_patched(False)

    def empty_contexts(self, plan: CachePlan) -> list[CachedContext]:
        return [
            CachedContext(name=name, cache_config=plan.cache_config(), calibrator_config=plan.calibrator_config())
            for name in self.names
        ]

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._set_patched(False)
        return self.original(*args, **kwargs)

    def _run_cached(self, in_use: list[CachedContext], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._set_patched(True)
        self.manager._cached_context_manager = dict(zip(self.names, in_use, strict=True))
        self.manager._current_context = None
        return self.cached(*args, **kwargs)

    def _set_patched(self, is_patched: bool) -> None:
        if self.is_patched != is_patched:
            for patch in self.patches:
                patch.apply() if is_patched else patch.undo()
            self.is_patched = is_patched

    def _find_obstacle(self, contexts: Contexts, args: Any, kwargs: Any) -> str | None:
        plan = contexts.plan
        in_use = contexts.passes.setdefault(self.guidance_pass, self.empty_contexts(plan))
        if in_use[0].executed_steps >= plan.num_inference_steps:
            # cache-dit would refresh here by itself, a step too late.
            return f"it runs more than the {plan.num_inference_steps} steps of its plan"
        shapes = _described_arguments((args, kwargs), with_sizes=True)
        if contexts.shapes.setdefault(self.guidance_pass, shapes) != shapes:
            return "the arguments of the transformer changed between two of its steps"
        combination = _described_arguments((args, kwargs), with_sizes=False)
        if combination not in self.obstacles:
            self.obstacles[combination] = self._compare(plan, args, kwargs)
        return self.obstacles[combination]

    def _compare(self, plan: CachePlan, args: Any, kwargs: Any) -> str | None:
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, PLAIN_ARGUMENTS):
                return f"the transformer is given a {type(leaf).__name__}, whose state a cached step would miss"
        expected = self._run_original(args, kwargs)
        for leaf in tree_leaves(expected):
            if not isinstance(leaf, torch.Tensor | None):
                return f"the transformer returns a {type(leaf).__name__}, which a cached step would not fill"
        knobs = replace(plan.knobs, max_continuous_cached_steps=0, enable_taylorseer=False)
        scratch = self.empty_contexts(CachePlan(plan.num_inference_steps, knobs))
        try:
            output = self._run_cached(scratch, args, kwargs)
        except FAILURES_OF_A_PATCH as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise  # it says nothing of the patch
            return f"cache-dit cannot run this call ({type(error).__name__}: {error})"
        if _are_close(tree_leaves(output), tree_leaves(expected)):
            return None
        return "cache-dit does not give this call's result even when it computes everything"


def _are_close(outputs: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> bool:
    return len(outputs) == len(expected) and all(map(_is_close, outputs, expected))


def _is_close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    largest = b.abs().max().item() if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * largest)


def _described_arguments(value: Any, with_sizes: bool) -> str:
    """A text that is equal for arguments of the same names, kinds and (if asked) shapes."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape) if with_sizes else value.ndim}"
    if isinstance(value, dict):
        named = (f"{name}={_described_arguments(item, with_sizes)}" for name, item in sorted(value.items()))
        return f"({','.join(named)})"
    if isinstance(value, list | tuple):
        items = [_described_arguments(item, with_sizes) for item in value]
        return f"[{','.join(items if with_sizes else dict.fromkeys(items))}]"
    return repr(value) if isinstance(value, bool | None) else type(value).__name__
