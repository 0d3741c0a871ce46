"""Notices pipelines that rewire the denoiser past the modules of their own that requests have, and puts it back.

All requests share it: what the pipeline changes through a reference of its own cannot be kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deployments.errors import NotSupportedError

Part = tuple[torch.nn.Module, Any, tuple[Any, ...], tuple[Any, ...]]  # module, processor, hooks, pre-hooks


@dataclass(frozen=True)
class Wiring:
    """The parts of a model that pipelines are known to exchange: attention processors and hooks."""

    parts: tuple[Part, ...]


class SharedWiring:
    """How the denoisers of one pipeline were wired at the start."""

    def __init__(self, pipeline: str, denoisers: Mapping[str, torch.nn.Module]) -> None:
        self.pipeline = pipeline  # the name of its class, for people
        self._before = {name: read_wiring(module) for name, module in denoisers.items()}

    def check(self, component: str) -> None:
        """Raises NotSupportedError where the pipeline rewired the denoiser for this request."""
        before = self._before.get(component)
        if before is not None and restore_wiring(before):
            raise NotSupportedError(
                f"{self.pipeline} rewires {component} for such a request past its own modules, but others share it"
            )


def read_wiring(model: torch.nn.Module) -> Wiring:
    return Wiring(tuple(_read(module) for module in model.modules()))


def restore_wiring(before: Wiring) -> bool:
    """Returns whether anything had been changed. Parts that were added since (by Cache-DiT) are not looked at."""
    if all(_is_same(part, _read(part[0])) for part in before.parts):
        return False
    for module, processor, hooks, pre_hooks in before.parts:
        if processor is not None:
            module.__dict__["processor"] = processor
        module._forward_hooks.clear()
        module._forward_hooks.update(dict(hooks))
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(dict(pre_hooks))
    return True


def _read(module: torch.nn.Module) -> Part:
    return (
        module,
        module.__dict__.get("processor"),
        tuple(module._forward_hooks.items()),
        tuple(module._forward_pre_hooks.items()),
    )


def _is_same(a: Part, b: Part) -> bool:
    return a[1] is b[1] and a[2] == b[2] and a[3] == b[3]
