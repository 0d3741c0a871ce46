"""What calls a module. The engine itself merges, splits and compares tensors where they are; it calls no module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

CacheContext = tuple[Any, dict[str, Any]]  # the name of the pass ("cond", "uncond") and what else it was entered with
Call = Callable[[Any, str, CacheContext | None, Any, Any], Any]  # module, component, context, args, kwargs


class Executor(Protocol):
    """Runs forwards one after another, called in the engine's thread only."""

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        """The output of a forward of one or more samples; raises what the module raises."""
        ...

    def free_memory(self) -> None:
        """Gives memory that nobody uses back to the device, after a forward that did not fit."""
        ...


class LocalExecutor:
    """Calls the module in this process and waits until the device is done."""

    def __init__(self, call: Call | None = None, synchronize: Callable[[], None] | None = None) -> None:
        """`call` makes a forward in its context; None: the module alone. `synchronize` waits for the device."""
        self._call = call or call_module
        self._synchronize = synchronize

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        output = self._call(module, component, context, (), arguments)
        if self._synchronize is not None:
            self._synchronize()
        return output

    def free_memory(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def call_module(module: Any, component: str, context: CacheContext | None, args: Any, kwargs: Any) -> Any:
    """The module's forward, for modules that know no contexts."""
    return module(*args, **kwargs)
