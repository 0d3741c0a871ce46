"""One module whose sequence is split by the plan that cache-dit has for its class.

`cache_dit.enable_parallelism` makes its mesh of accelerators only; the same is set up here with a mesh of the group's,
and with torch's own attention.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from deployments.ranks.by_cache_dit.own_code import OwnCode, with_own_code
from deployments.ranks.by_cache_dit.uneven import split_uneven_parts

# Held against one process by tests/model/ranks/test_with_cache_dit.py. Other plans of cache-dit are not taken: that of
# Chroma leaves the mask of its text as it is for one rank, which is seen only where a prompt is short; that of Z-Image
# does not fit diffusers 0.42.
SHOWN = (
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "SkyReelsV2Transformer3DModel",
)


class SplitByCacheDit:
    """Its ranks must make its forwards at the same time."""

    holds_all = True

    def __init__(self, module: torch.nn.Module, degree: int, mesh: DeviceMesh, device: torch.device) -> None:
        """`mesh`: of the ranks that compute a sample, with the dimensions ring and ulysses."""
        from cache_dit.distributed.core import _ContextParallelConfig
        from cache_dit.distributed.core._context_parallel import _apply_context_parallel

        plan, self._code = planned(module, degree)
        self._config = _ContextParallelConfig(ulysses_degree=degree, ring_degree=1)
        self._config.setup(int(mesh.get_local_rank("ulysses")), mesh.size(), device, mesh=mesh)
        self._module = module
        self._set_config(self._config)
        split_uneven_parts()
        _apply_context_parallel(module, self._config, plan)
        self._hooks = [ref for registry in registries(module) for ref in registry._fn_refs]
        for registry in registries(module):
            call_by_class(registry)

    def set_uneven(self, uneven: bool) -> None:
        """Whether lengths that the ranks do not divide are split too."""
        self._config.ulysses_anything = uneven

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Meanwhile a rank computes the module's forwards alone, by diffusers' own code."""
        with ExitStack() as left:
            left.callback(self._set_config, self._config)
            self._set_config(None)
            for hook in self._hooks:
                left.callback(setattr, hook, "pre_forward", hook.pre_forward)
                left.callback(setattr, hook, "post_forward", hook.post_forward)
                hook.pre_forward, hook.post_forward = same_arguments, same_output
            left.enter_context(self._code.without())
            yield

    def _set_config(self, config: Any) -> None:
        self._module._cp_config = config
        for part in self._module.modules():
            processor = getattr(part, "processor", None)
            if processor is not None:
                processor._cp_config = processor._parallel_config = config


def cache_dit_problem(module: torch.nn.Module, degree: int) -> str | None:
    """Why its sequence cannot be split over so many ranks by a plan of cache-dit; None: it can."""
    if type(module).__name__ not in SHOWN:
        return f"{type(module).__name__} has no plan for it that was shown to be right, in diffusers or in cache-dit"
    heads = heads_of(module)
    if heads is not None and heads % degree:
        return f"{degree} does not divide the {heads} attention heads of {type(module).__name__}"
    others = [name for name in attentions_of(module) if name != "native"]
    if others:
        return (
            f"its attention is {others[0]!r}, and cache-dit's plan for {type(module).__name__} goes with torch's own: "
            "leave SGLANG_DIFFUSION_ATTENTION_BACKEND unset"
        )
    return plan_problem(module, degree)


def planned(module: torch.nn.Module, degree: int) -> tuple[Any, OwnCode]:
    """The plan, whose code the module has from now on; raises what the planner does of a model that it is not for."""
    from cache_dit.distributed import ParallelismConfig

    planner = registered_plans().get_planner(type(module).__name__)
    asked = ParallelismConfig(ulysses_size=degree)
    try:
        return with_own_code(module, lambda: planner().apply(module, parallelism_config=asked))
    finally:
        vars(module).pop("_cp_plan", None)


def plan_problem(module: torch.nn.Module, degree: int) -> str | None:
    """Why the plan is not for this module; found by making it, and leaving nothing of it."""
    from cache_dit.distributed.core._context_parallel import _get_submodule_by_name

    try:
        plan, code = planned(module, degree)
        code.end()
        for part in plan:
            _get_submodule_by_name(module, part)
    except Exception as error:  # noqa: BLE001  (planners assert what they are for)
        return f"the plan of cache-dit is not for {type(module).__name__} as it is here: {error!r}"
    return None


@functools.cache
def registered_plans() -> Any:
    """Loads the plans of all models, once; diffusers' attention is cache-dit's from then on, and calls torch's own."""
    dispatch = importlib.import_module("cache_dit.distributed.transformers.dispatch")
    dispatch._ensure_cp_planners_activated()
    return dispatch.ContextParallelismPlannerRegister


def heads_of(module: torch.nn.Module) -> int | None:
    config = getattr(module, "config", None)
    for name in ("num_attention_heads", "n_heads", "num_heads"):
        if isinstance(heads := getattr(config, name, None), int):
            return heads
    return None


def attentions_of(module: torch.nn.Module) -> list[str]:
    """The names of those that were chosen for parts of the module, each once."""
    found = (getattr(getattr(part, "processor", None), "_attention_backend", None) for part in module.modules())
    return list(dict.fromkeys(str(getattr(each, "value", each)) for each in found if each is not None))


def registries(module: torch.nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if "_cache_dit_hook" in vars(part):
            yield vars(part)["_cache_dit_hook"]


def call_by_class(registry: Any) -> None:
    """The innermost hook calls what the module's class says when it is called, not when it was hung in."""
    module, innermost = registry._module_ref, registry._fn_refs[0]
    if getattr(innermost.forward, "__self__", None) is module:
        innermost.forward = functools.partial(forward_by_class, module)


def forward_by_class(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def same_arguments(module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def same_output(module: Any, output: Any) -> Any:
    return output
