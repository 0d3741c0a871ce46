"""What a request may add to its denoising: a feature is one file and one row of FEATURES, and answers eight questions.

Which requests want it, and with what (`wanted`)? What must be brought here for it (`fetch`)? How does it begin in a
request's session, and what does it take over from a checkpoint (`begin`)? What surrounds one forward, and under which
key may that forward share a batch (`surround`)? What of it goes into a checkpoint (`snapshot`)? What does it let go of
when the request has ended (`end`)? What do /dev/features and the metrics say (`summary`)?
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.adapters.held import Adapters
from deployments.denoising.checkpoint import ResumableSession
from deployments.engine.forward import PerSample, Surround
from deployments.modules import StageModules
from env_config.variables import EnvConfig


@dataclass(frozen=True)
class Surrounding:
    """What is entered around one forward, in the engine's thread; it touches nothing that another forward sees."""

    enter: Surround | None = None
    merge_key: Hashable | None = None  # equal keys may share a batch, surrounded as its first forward; None: alone
    by_position: bool = False  # what is entered tells the samples of a batch by their place in it
    per_sample: PerSample | None = None  # entered once for a batch, and separates none: any values may share one


NOTHING = Surrounding(None, ())


@dataclass(frozen=True)
class Summary:
    """What a feature has done for one request."""

    values: dict[str, Any]  # plain values, for /dev/features
    measurements: tuple[object, ...] = ()  # for the metrics: each type needs a row of EXPORTS in replicas/metrics.py


@dataclass(frozen=True)
class Fetched:
    """What a feature has brought to this process for one request."""

    options: Any  # for `begin`
    fingerprint: str = ""  # of what of it changes the numbers: a checkpoint made with other contents is refused
    entry: Any = None  # the request's own, saying what was found; None: as it was


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

    def end(self) -> None:
        """In the thread that makes the forwards, when the request has ended in whatever way."""
        ...

    def summary(self) -> Summary | None:
        """Asked after that; None: there is nothing to say."""
        ...


def nothing_to_install(modules: StageModules, env: EnvConfig) -> str:
    """For a feature that needs no preparation of the modules."""
    return ""


def nothing_to_fetch(adapters: Adapters | None, options: Any) -> Fetched:
    """For a feature that has all it needs."""
    return Fetched(options)


@dataclass(frozen=True)
class Feature:
    """One row of FEATURES.

    `wanted` gets the process's settings and the request's own entry (None: it has none), and returns what `begin`
    gets, or None for a request that goes without. It raises InvalidRequestError before the denoiser has run anything.
    `fetch` gets the adapters of the process (None: it has none) and what `wanted` returned, in a thread of the
    request's own, which may wait for a download. What it raises ends the request before the denoiser has run anything.
    `begin` gets what was fetched, the session, and the snapshot of the checkpoint that it goes on from (None: none), in
    the thread that makes the forwards.
    `settings` are those of the process that change the numbers: a checkpoint made under others is refused. Their
    repr must be the same in every process.
    `install` prepares the modules of a stage once, at its start, and returns a line for the log.
    """

    name: str  # of its entry in GenerationRequest.features
    wanted: Callable[[EnvConfig, Any], Any]
    begin: Callable[[Any, ResumableSession, Any], FeatureInUse]
    settings: Callable[[EnvConfig], object] = lambda env: None
    fetch: Callable[[Adapters | None, Any], Fetched] = nothing_to_fetch
    install: Callable[[StageModules, EnvConfig], str] = nothing_to_install
    is_asked_for: bool = True  # by requests that name it; else `wanted` alone says which have it
    is_a_field: bool = True  # callers write it themselves; else what the ingress has made of other fields
    is_a_cache: bool = (
        False  # a request may go on without its snapshot: it fills again, and the numbers are not the same
    )
