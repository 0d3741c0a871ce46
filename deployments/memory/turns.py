"""Components that come to the device for their calls by turns: one is there at a time, the others on the host."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deployments.memory.host_weights import HostWeights

# What pipelines call on a component besides its forward; each is one visit to the device, whatever it calls inside.
VISITS = ("encode", "decode", "generate", "get_text_features", "get_image_features")
MOVES_KEPT = 1000


class Turns:
    """Lets components onto a device one at a time.

    A component stays there after its call, for the next one, until another's turn comes or `rest` finds it idle. A call
    of one waits while another one is in a call in another thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.moves: list[str] = []  # the latest components that came to the device
        self._device = device
        self._weights: dict[str, HostWeights] = {}
        self._turn = threading.RLock()
        self._depth = 0  # of visits within each other
        self._present: str | None = None
        self._last_thread: int | None = None  # that made a visit

    def add(self, name: str, module: Any, pin_memory: bool = False) -> None:
        """From now on the component's weights are on the host, but for its calls.

        Several models of one process may have components of one name.
        """
        name = name if name not in self._weights else f"{name} ({len(self._weights)})"
        self._weights[name] = HostWeights(module, pin_memory)
        for part in called_parts(module):
            vars(part)["forward"] = self._visiting(name, part.forward)
        for method in VISITS:
            if callable(getattr(module, method, None)):
                vars(module)[method] = self._visiting(name, getattr(module, method))

    @property
    def present(self) -> str | None:
        """The component that is on the device."""
        return self._present

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """The component is on the device. Raises what the device raises where it does not fit."""
        with self._turn:
            self._depth += 1
            self._last_thread = threading.get_ident()
            try:
                if self._present != name:
                    self._come(name)
                yield
            finally:
                self._depth -= 1

    def rest(self, of_all_threads: bool = False) -> None:
        """The component on the device goes back to the host where it is in no call and this thread called it last."""
        if not self._turn.acquire(blocking=False):
            return  # it is in a call
        try:
            is_ours = of_all_threads or self._last_thread == threading.get_ident()
            if is_ours and self._depth == 0:
                self._leave()
        finally:
            self._turn.release()

    def _come(self, name: str) -> None:
        self._leave()
        self._present = name
        try:
            self._weights[name].to(self._device)
        except Exception:
            self._leave()  # what of it has come
            raise
        self.moves = [*self.moves[1 - MOVES_KEPT :], name]

    def _leave(self) -> None:
        if self._present is not None:
            self._weights[self._present].back()
            self._present = None

    def _visiting(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def visiting(*args: Any, **kwargs: Any) -> Any:
            with self.visit(name):
                return function(*args, **kwargs)

        return visiting


def called_parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The component and those of its modules that pipelines call by themselves: its children, and embeddings."""
    children = [
        part
        for child in module.children()
        for part in (child.children() if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) else (child,))
    ]
    embeddings = [part for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    yield from dict.fromkeys([module, *children, *embeddings])
