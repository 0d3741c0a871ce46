"""The LoRAs of requests on the ranks of their denoiser: each rank loads the same files by a library of its own."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from deployments.adapters.forward import applied, prepare, under_way
from deployments.adapters.held import Adapters, Held, OnHost
from deployments.adapters.use import AdapterUse
from deployments.ranks.adapters import Absent, Used
from deployments.ranks.loss.left_alone import reason_of
from deployments.tensors.out_of_memory import let_go

PATIENCE_S = 10.0


class AdaptersOfRankZero:
    """The library of the engine's process, which notes what requests hold; Adapters and AdaptersHere."""

    def __init__(self, library: Adapters) -> None:
        self._library = library
        self._held: list[Held] = []

    def fetched(self, use: AdapterUse) -> OnHost:
        return self._library.fetched(use)

    @contextmanager
    def holding(self, uses: Sequence[AdapterUse]) -> Iterator[Sequence[Held]]:
        with self._library.holding(uses) as held:
            self._held += held
            try:
                yield held
            finally:
                for each in held:
                    self._held.remove(each)

    def uses(self) -> Mapping[str, AdapterUse]:
        return {each.peft_name: each.use for each in self._held}

    def used(self, module: Any) -> Used | None:
        batch = under_way(module)
        return None if batch is None else Used(batch.runs, batch.is_even)

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]:
        return applied(module, used.runs, used.is_even)


class AdaptersOfRank:
    """AdaptersThere: what rank 0 says that requests hold."""

    def __init__(self, library: Adapters, modules: Collection[torch.nn.Module], patience_s: float = PATIENCE_S) -> None:
        """`patience_s`: so long rank 0 is kept waiting for what is fetched the first time."""
        self._library, self._modules, self._patience_s = library, modules, patience_s
        self._held: dict[AdapterUse, ExitStack] = {}
        self._fetching: dict[AdapterUse, Future[OnHost]] = {}

    def hold(self, uses: Mapping[str, AdapterUse]) -> Absent:
        # One file at any scale is held once.
        wanted = {name: replace(use, scale=1.0) for name, use in uses.items()}
        for gone in self._held.keys() - wanted.values():
            self._held.pop(gone).close()
        self._fetching = {use: each for use, each in self._fetching.items() if use in wanted.values()}
        new = {use: self._fetched(use) for use in {*wanted.values()} - self._held.keys() - self._fetching.keys()}
        self._fetching |= new
        wait(new.values(), self._patience_s)
        failed = {use: reason for use in {*wanted.values()} & self._fetching.keys() if (reason := self._taken_in(use))}
        for module in self._modules:
            prepare(module)
        return Absent(
            tuple(name for name, use in wanted.items() if use in self._fetching),
            {name: failed[use] for name, use in wanted.items() if use in failed},
        )

    def _fetched(self, use: AdapterUse) -> Future[OnHost]:
        """In a thread: from another machine it may take long, and this one makes forwards meanwhile."""
        fetching: Future[OnHost] = Future()

        def fetch() -> None:
            try:
                fetching.set_result(self._library.fetched(use))
            except BaseException as error:  # noqa: BLE001  (raised where the result is asked for)
                fetching.set_exception(error)

        threading.Thread(target=fetch, name="fetch_lora", daemon=True).start()
        return fetching

    def _taken_in(self, use: AdapterUse) -> str | None:
        """Held from now on, if it is fetched; why it cannot be."""
        if not self._fetching[use].done():
            return None
        try:
            with ExitStack() as stack:
                on_host = self._fetching.pop(use).result()  # which the library keeps as long as somebody has it
                stack.enter_context(self._library.holding([use]))
                self._held[use] = stack.pop_all()
                del on_host
        except Exception as error:  # noqa: BLE001  (told to rank 0, which then makes such forwards alone)
            let_go(error)
            return reason_of(error)
        return None

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]:
        return applied(module, used.runs, used.is_even)
