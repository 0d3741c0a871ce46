"""SPLITS: the ways to split a denoiser's forward over ranks, a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from deployments.modules import AccelerationError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.by_cache_dit.sequence import SplitByCacheDit, cache_dit_problem
from deployments.ranks.sequence.context import SplitByContext, context_problem, ring_problem
from deployments.ranks.weights import SplitByWeights, weights_problem

Modules = Mapping[str, torch.nn.Module]


class SplitModule(Protocol):
    """What was put into a module, so that its ranks compute each sample together."""

    holds_all: bool  # whether each rank has all the weights, and can compute alone

    def set_uneven(self, uneven: bool) -> None:
        """Whether lengths that the ranks do not divide are split too."""
        ...

    def whole(self) -> Any:
        """A context manager: meanwhile a rank computes alone. Raises NotSupportedError where it has only a part."""
        ...


@dataclass(frozen=True)
class Split:
    """A way: why it cannot be had (of a module, the number of ranks and the device), and how a module is prepared."""

    problem: Callable[[torch.nn.Module, int, torch.device], str | None]
    install: Callable[[torch.nn.Module, ParallelArgs, DeviceMesh, torch.device], SplitModule] | None = None


def by_context(module: torch.nn.Module, args: ParallelArgs, mesh: DeviceMesh, device: torch.device) -> SplitModule:
    if args.ring == 1 and not has_own_plan(module):
        return SplitByCacheDit(module, args.ulysses, mesh["ring", "ulysses"], device)
    return SplitByContext(module, args.ulysses, args.ring, mesh["ring", "ulysses"], device)


def by_weights(module: torch.nn.Module, args: ParallelArgs, mesh: DeviceMesh, device: torch.device) -> SplitModule:
    return SplitByWeights(module, mesh["tensor"], device)


def ulysses_problem(module: torch.nn.Module, degree: int, device: torch.device) -> str | None:
    return context_problem(module, degree) if has_own_plan(module) else cache_dit_problem(module, degree)


def has_own_plan(module: torch.nn.Module) -> bool:
    """One of diffusers; else cache-dit is asked."""
    return bool(getattr(module, "_cp_plan", None))


SPLITS: dict[str, Split] = {
    "ulysses": Split(ulysses_problem, by_context),
    "ring": Split(lambda module, degree, device: ring_problem(module, degree), by_context),
    "tensor": Split(weights_problem, by_weights),
    "batch": Split(lambda module, degree, device: None),  # whole samples: the module stays as it is
}


def check_splits(modules: Modules, args: ParallelArgs, device: torch.device) -> None:
    """Raises AccelerationError, which names the way, the module, and the ways that all the modules have."""
    for way, degree in args.degrees.items():
        for name, module in modules.items():
            problem = SPLITS[way].problem(module, degree, device)
            if problem is not None:
                have = [other for other in SPLITS if all(not _problem(other, m, device) for m in modules.values())]
                raise AccelerationError(
                    f"parallel.{way}: {degree} is not possible for {name}: {problem}. "
                    f"Here can be had: {', '.join(have)}"
                )


def install_splits(
    modules: Modules, args: ParallelArgs, mesh: DeviceMesh, device: torch.device
) -> dict[str, SplitModule]:
    """By module, on every rank in the same order; empty where only samples are split."""
    installs = {SPLITS[way].install for way in args.degrees} - {None}
    return {
        name: install(module, args, mesh, device) for install in installs if install for name, module in modules.items()
    }


def _problem(way: str, module: torch.nn.Module, device: torch.device) -> str | None:
    return SPLITS[way].problem(module, 2, device)
