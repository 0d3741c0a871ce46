"""What the library of a stage's process does for requests that use adapters, as a protocol."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from deployments.adapters.use import AdapterUse


class Held(Protocol):
    """An adapter that is in the PEFT layers of the process's modules, and stays there while it is held."""

    @property
    def peft_name(self) -> str: ...  # in those layers; equal for equal contents

    @property
    def components(self) -> Collection[str]: ...  # that it changes, here or in other stages

    @property
    def use(self) -> AdapterUse: ...


class OnHost(Protocol):
    """An adapter whose weights are in this process's memory."""

    @property
    def digest(self) -> str: ...  # SHA-256 of the file that they came from


class Adapters(Protocol):
    """The adapters of one process."""

    def fetched(self, use: AdapterUse) -> OnHost:
        """Called in any thread, for as long as a download takes. Raises InvalidRequestError for one that does not fit
        the model, and an error that is worth a retry for a place that cannot be reached.
        """
        ...

    def holding(self, uses: Sequence[AdapterUse]) -> AbstractContextManager[Sequence[Held]]:
        """Those of the uses, in their order; entered and left in the thread that makes the modules' forwards."""
        ...
