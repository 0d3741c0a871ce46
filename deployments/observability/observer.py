"""What an observer of a replica is: one file with its class, and one row in `deployments.observability.table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from deployments.messages import UNFOLLOWED, Envelope, GenerationRequest, StageName
from deployments.tracing import NO_SPAN, Span
from env_config.variables import EnvConfig

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Kind = TypeVar("Kind", bound="Observer")


@dataclass(frozen=True)
class ObservedReplica:
    """What an observer may know of its replica when it is made."""

    env: EnvConfig
    replica_id: str
    stages: tuple[StageName, ...]
    synchronize: Callable[[], None]  # returns when the device has done all that was queued


@dataclass
class StageWork:
    """What one stage does for one request; the stage fills in the rest while it works."""

    stage: StageName
    request: GenerationRequest
    arrived: float  # time.time()
    envelope: Envelope = UNFOLLOWED
    sent: float = 0.0  # time.time() at which the stage before had made the inputs; 0: no stage made them
    bytes_in: int = 0
    bytes_out: int = 0
    steps: int = 0  # of the scheduler, done here
    on_step: list[Callable[[], None]] = field(default_factory=list)
    span: Span = NO_SPAN  # that times it, where it is traced

    def step(self) -> None:
        """A step of the scheduler is done: calls all of `on_step`, in the thread that did it."""
        for call in self.on_step:
            call()


class Observer:
    """A subclass overrides what it needs; as it stands it watches nothing."""

    def wrap_kernel(self, name: str, kernel: Kernel) -> Kernel:
        """What an acceleration installs in place of `kernel`, named such as "attention.transformer.flash"."""
        return kernel

    def install(self, components: Mapping[str, torch.nn.Module]) -> None:
        """Called once, with the components of the replica by name, after all accelerations."""

    def present(self, work: StageWork) -> AbstractContextManager[object]:
        """From the arrival of a request until it has left. Before its turn, perhaps in another thread than `around`."""
        return nullcontext()

    def around(self, work: StageWork) -> AbstractContextManager[object]:
        """While the stage works on the request, in the thread that works."""
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        """What /dev/replicas shows of it, by name."""
        return {}

    def recall(self, request_id: str) -> list[dict[str, Any]]:
        """The records that it has kept of the request."""
        return []

    def forget(self) -> None:
        """Drops what it has kept of past requests."""


# A row of the table: makes the observer of a replica, or None where its variables do not ask for one.
MakeObserver = Callable[[ObservedReplica], Observer | None]


class Observers(Observer):
    """The observers of one replica as one, nested in the order of their rows: the last is the innermost."""

    def __init__(self, replica: ObservedReplica, rows: Sequence[MakeObserver]) -> None:
        """Raises ValueError for a variable that an observer cannot do."""
        made = [make(replica) for make in rows]
        self._observers = [observer for observer in made if observer is not None]

    def find(self, kind: type[Kind]) -> Kind:
        """The observer of that class. Raises LookupError."""
        for observer in self._observers:
            if isinstance(observer, kind):
                return observer
        raise LookupError(f"this replica has no {kind.__name__}")

    def wrap_kernel(self, name: str, kernel: Kernel) -> Kernel:
        for observer in reversed(self._observers):
            kernel = observer.wrap_kernel(name, kernel)
        return kernel

    def install(self, components: Mapping[str, torch.nn.Module]) -> None:
        for observer in reversed(self._observers):
            observer.install(components)

    @contextmanager
    def present(self, work: StageWork) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.present(work))
            yield

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.around(work))
            yield

    def describe(self) -> dict[str, Any]:
        return {name: value for observer in self._observers for name, value in observer.describe().items()}

    def recall(self, request_id: str) -> list[dict[str, Any]]:
        return [record for observer in self._observers for record in observer.recall(request_id)]

    def forget(self) -> None:
        for observer in self._observers:
            observer.forget()
