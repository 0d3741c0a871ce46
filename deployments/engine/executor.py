"""What calls a module. The engine itself merges, splits and compares tensors where they are; it calls no module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from deployments.engine.marks import Mark, marks_of

CacheContext = tuple[Any, dict[str, Any]]  # the name of the pass ("cond", "uncond") and what else it was entered with
Call = Callable[[Any, str, CacheContext | None, Any, Any], Any]  # module, component, context, args, kwargs


class Executor(Protocol):
    """Runs forwards one after another, called in the engine's thread only."""

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        """The output of a forward of one or more samples, whose numbers may come later; raises what the module raises.

        An error of the device may show later too, where a mark behind the forward is waited for.
        """
        ...

    def mark(self) -> Mark:
        """A mark behind all that was run so far."""
        ...

    def free_memory(self) -> None:
        """Gives memory that nobody uses back to the device, after a forward that did not fit."""
        ...


class LocalExecutor:
    """Calls the module in this process; on an accelerator the host goes on while the device works."""

    def __init__(
        self,
        call: Call | None = None,
        device: torch.device | None = None,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`call` makes a forward in its context; None: the module alone. `device`: where it computes; None: the CPU.
        `give_back` gives it what nobody uses."""
        self._call = call or call_module
        self.free_memory = give_back
        self.mark = marks_of(device or torch.device("cpu"))

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        return self._call(module, component, context, (), arguments)


def call_module(module: Any, component: str, context: CacheContext | None, args: Any, kwargs: Any) -> Any:
    """The module's forward, for modules that know no contexts."""
    return module(*args, **kwargs)
