"""The LoRAs of requests on the ranks of their denoiser: each rank loads the same files by a library of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from deployments.adapters.forward import applied, prepare, under_way
from deployments.adapters.held import Adapters, Held, OnHost
from deployments.adapters.use import AdapterUse
from deployments.ranks.adapters import Used


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

    def __init__(self, library: Adapters, modules: Collection[torch.nn.Module]) -> None:
        self._library, self._modules = library, modules
        self._held: dict[AdapterUse, ExitStack] = {}

    def hold(self, uses: Sequence[AdapterUse]) -> None:
        # One file at any scale is held once.
        wanted = dict.fromkeys(replace(use, scale=1.0) for use in uses)
        for gone in [use for use in self._held if use not in wanted]:
            self._held.pop(gone).close()
        for use in wanted:
            if use not in self._held:
                with ExitStack() as stack:
                    stack.enter_context(self._library.holding([use]))
                    self._held[use] = stack.pop_all()
        for module in self._modules:
            prepare(module)

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]:
        return applied(module, used.runs, used.is_even)
