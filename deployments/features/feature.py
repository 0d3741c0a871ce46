"""What a request may add to its denoising: a feature is one file and one row of FEATURES, and answers six questions.

Which requests want it, and with what (`wanted`)? How does it begin in a request's session, and what does it take over
from a checkpoint (`begin`)? What surrounds one forward, and under which key may that forward share a batch
(`surround`)? What of it goes into a checkpoint (`snapshot`)? What do /dev/features and the metrics say (`summary`)?
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.denoising.checkpoint import ResumableSession
from deployments.engine.forward import Surround
from deployments.modules import StageModules
from env_config.variables import EnvConfig


@dataclass(frozen=True)
class Surrounding:
    """What is entered around one forward, in the engine's thread; it touches nothing that another forward sees."""

    enter: Surround | None = None
    merge_key: Hashable | None = None  # equal keys may share a batch, surrounded as its first forward; None: alone
    by_position: bool = False  # what is entered tells the samples of a batch by their place in it


NOTHING = Surrounding(None, ())


@dataclass(frozen=True)
class Summary:
    """What a feature has done for one request."""

    values: dict[str, Any]  # plain values, for /dev/features
    measurements: tuple[object, ...] = ()  # for the metrics: each type needs a row of EXPORTS in replicas/metrics.py


class FeatureInUse(Protocol):
    """A feature in the session of one request."""

    def surround(self, component: str, module: Any) -> Surrounding:
        """For the forward that comes next; NOTHING leaves it as it is.

        Asked too for the forwards that a resumed request makes again before its checkpoint (`session.is_skipping`).
        """
        ...

    def snapshot(self) -> Any:
        """Plain values and tensors that `begin` takes over in another process; None: there is nothing to keep.

        They are packed later, in another thread: nobody writes into them any more.
        """
        ...

    def summary(self) -> Summary | None:
        """Asked when the request has ended in whatever way; None: there is nothing to say."""
        ...


def nothing_to_install(modules: StageModules, env: EnvConfig) -> str:
    """For a feature that needs no preparation of the modules."""
    return ""


@dataclass(frozen=True)
class Feature:
    """One row of FEATURES.

    `wanted` gets the process's settings and the request's own entry (None: it has none), and returns what `begin`
    gets, or None for a request that goes without. It raises InvalidRequestError before the denoiser has run anything.
    `begin` gets that, the session, and the snapshot of the checkpoint that the session goes on from (None: none).
    `settings` are those of the process that change the numbers: a checkpoint made under others is refused. Their
    repr must be the same in every process.
    `install` prepares the modules of a stage once, at its start, and returns a line for the log.
    """

    name: str  # of its entry in GenerationRequest.features
    wanted: Callable[[EnvConfig, Any], Any]
    begin: Callable[[Any, ResumableSession, Any], FeatureInUse]
    settings: Callable[[EnvConfig], object] = lambda env: None
    install: Callable[[StageModules, EnvConfig], str] = nothing_to_install
    is_asked_for: bool = True  # by requests that name it; else `wanted` alone says which have it
    is_a_cache: bool = (
        False  # a request may go on without its snapshot: it fills again, and the numbers are not the same
    )
