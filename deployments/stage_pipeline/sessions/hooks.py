"""Forward hooks that a pipeline sets on parts of a component, which may be called in another stage.

Nothing is left on modules that requests share: a hook is on them while the component is called. What it was told is
recorded with the call, and told again where the call is replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from deployments.tensors.values import copied

Told = tuple[int, Any]  # the ordinal of a hook among those that are set, and what it was told beside the module


@dataclass(frozen=True, eq=False)
class Hook:
    """One that a pipeline has set: `register` is the module's method that sets it, with its options."""

    component: str
    path: str
    register: str
    function: Any
    options: dict[str, Any]


@dataclass
class Hooks:
    """Those of one request, in the order in which they were set."""

    active: list[Hook] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)  # since the last `take_told`

    def add(self, hook: Hook) -> HookHandle:
        self.active.append(hook)
        return HookHandle(self, hook)

    def are_on(self, component: str) -> bool:
        return any(hook.component == component for hook in self.active)

    @contextlib.contextmanager
    def on_modules(self, pipeline: Any) -> Iterator[None]:
        """Sets them on the real modules of `pipeline` and takes them away again."""
        with contextlib.ExitStack() as handles:
            for ordinal, hook in enumerate(self.active):
                module = part_of(pipeline, hook)
                handles.enter_context(getattr(module, hook.register)(self._telling(ordinal, hook), **hook.options))
            yield

    def _telling(self, ordinal: int, hook: Hook) -> Any:
        def tell(module: torch.nn.Module, *values: Any) -> Any:
            self.told.append((ordinal, copied(values)))
            return hook.function(module, *values)

        return tell

    def take_told(self) -> list[Told]:
        told, self.told = self.told, []
        return told

    def tell_again(self, told: list[Told], pipeline: Any) -> None:
        """What a hook answers changed the recorded call already."""
        for ordinal, values in told:
            hook = self.active[ordinal]
            hook.function(part_of(pipeline, hook), *values)


@dataclass(frozen=True)
class HookHandle:
    """As torch's handle of a hook."""

    hooks: Hooks
    hook: Hook

    def remove(self) -> None:
        if self.hook in self.hooks.active:
            self.hooks.active.remove(self.hook)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def part_of(pipeline: Any, hook: Hook) -> torch.nn.Module:
    module: torch.nn.Module = getattr(pipeline, hook.component).get_submodule(hook.path)
    return module
