"""A model that may be asleep: whether it is, how it is woken, and what its callers are told meanwhile.

Serve's autoscaling takes the replicas away (serve_app.autoscaling.sleep) and starts them when a call waits for one.
Here no call is made of a model that sleeps but for a request that was found to be valid.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.messages import StageDescription
from deployments.metrics.meter import NO_METER, Meter
from serve_app.errors import ModelLoadingError
from serve_app.making.sleep.deployment_states import DeploymentStates, State
from serve_app.making.sleep.kept_facts import Facts

logger = logging.getLogger(__name__)

ModelState = Literal["ready", "loading", "waking", "asleep"]  # waking: it loads because a request came
RESTING = ("asleep", "waking")  # nobody may call its stages: that would wake it, or wait behind its start

FRESH_IN_USE_S = 5.0  # old enough for a model that has work: it was awake a moment ago
NOTE_S = 5.0  # between two notes that a model is in use
FRESH_S = 1.0  # so long after a look or the last request a model counts as awake
PAUSE_S = 1.0  # before a stage is asked again that could not be
UNKNOWN_RETRY_S, SHORTEST_RETRY_S = 15, 3  # of Retry-After


class Store(Protocol):
    """Where facts are kept; raises nothing."""

    async def read(self) -> Facts: ...

    async def write(self, facts: Facts) -> None: ...

    async def note_use(self, deployment: str) -> None: ...


def nobody(about_s: float | None) -> None:
    """Is told nothing."""


class ModelSleep:
    """Of one model, in one ingress replica. Without `states` it is never asleep: its stages are no deployments."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        states: DeploymentStates | None = None,
        store: Store | None = None,
        name: str = "",
        meter: Meter = NO_METER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`handles`: by the name of the deployment, in the order in which requests come to them."""
        self.handles = handles
        self.name = name
        self.max_wait_s = math.inf  # that a request waits which is answered at once
        self.on_awake: Callable[[], None] = lambda: None
        self.loads = 0  # how often it was seen to become ready: what it says of itself may be new
        self.described: StageDescription | None = None  # what the encoder said when it was woken here last
        self._states, self._store, self._meter, self._clock = states, store, meter, clock
        self._facts: Facts | None = None
        self._last: ModelState | None = None
        self._waking: asyncio.Task[None] | None = None
        self._woken_at = 0.0
        self._noting: asyncio.Task[None] | None = None
        self._in_use = 0
        self._used_at = -FRESH_S

    # --- whether it is ---

    async def state(self, max_age_s: float = 0.0) -> ModelState:
        """As Serve's controller says; ready where it does not answer: then calls tell."""
        if self._states is None:
            return "ready"
        told = await self._states.read(max(max_age_s, FRESH_IN_USE_S if self._was_just_used else 0.0))
        own = {told.get(name) for name in self.handles}
        state: ModelState = "ready"
        if self._is_waking or "waking" in own:
            state = "waking"
        elif "asleep" in own:
            state = "asleep"
        elif own & {"starting", "failed"}:
            state = "loading"
        if state == "ready" and self._last not in (None, "ready"):
            self.loads += 1
        self._last = state
        return state

    async def is_resting(self) -> bool:
        return await self.state(FRESH_S) in RESTING

    async def resting_deployments(self) -> dict[str, State]:
        """Those that must not be asked anything now, each with its state: all, while nobody knows what is there."""
        if self._states is None:
            return {}
        told = await self._states.read(FRESH_S)
        if not told:
            return dict.fromkeys(self.handles, "starting")
        return {name: told[name] for name in self.handles if told.get(name) in RESTING}

    # --- how it is woken ---

    async def awake(self, tell: Callable[[float | None], None] = nobody, max_wait_s: float = math.inf) -> None:
        """Returns when a request may go to the stages. Wakes the model, once for all who wait.

        `tell` hears that it must wait, and about how many seconds (None: not measured yet). Raises ModelLoadingError
        where that is more than `max_wait_s`, or turns out to be.
        """
        if not self._was_just_used:
            await self._note_use()
        state = await self.state()
        if state == "ready":
            self._used_at = self._clock()
        if state not in RESTING:
            return
        waking = await self.wake()
        about_s = self.about_s()
        tell(about_s)
        if about_s is not None and about_s > max_wait_s:
            raise self.refusal()
        try:
            await asyncio.wait_for(asyncio.shield(waking), None if math.isinf(max_wait_s) else max_wait_s)
        except TimeoutError:
            raise self.refusal() from None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a request is in the stages; a model that has one is not asleep."""
        self._in_use += 1
        self._keep_noting()
        try:
            yield
        finally:
            self._in_use -= 1
            self._used_at = self._clock()

    async def wake(self) -> asyncio.Task[None]:
        """The waking that is under way, or a new one."""
        if not self._is_waking:
            is_measured = self._last == "asleep"  # else it was begun elsewhere, and is not seen from its beginning
            self._woken_at = self._clock()
            # An empty context: it does not end with the HTTP request that began it.
            context = contextvars.Context()
            self._waking = asyncio.get_running_loop().create_task(self._wake(is_measured), context=context)
            self._keep_noting()
            await self.facts(again=True)  # another ingress replica may have measured it
        assert self._waking is not None
        return self._waking

    def _keep_noting(self) -> None:
        """While it is in use or woken, no stage goes that has nothing to do yet, or whose replica was the first."""
        if self._store is not None and (self._noting is None or self._noting.done()):
            context = contextvars.Context()
            self._noting = asyncio.get_running_loop().create_task(self._note_until_idle(), context=context)

    async def _note_until_idle(self) -> None:
        while self._in_use or self._is_waking:
            await self._note_use()
            await asyncio.sleep(NOTE_S)

    async def _note_use(self) -> None:
        if self._store is not None:
            await asyncio.gather(*map(self._store.note_use, self.handles))

    @property
    def _was_just_used(self) -> bool:
        return self._in_use > 0 or self._clock() < self._used_at + FRESH_S

    @property
    def _is_waking(self) -> bool:
        return self._waking is not None and not self._waking.done()

    async def _wake(self, is_measured: bool) -> None:
        """One call of each stage, which waits for its replica: all start at once where the policy is ours."""
        logger.info("the model %s is woken", self.name)
        self._meter.count("triptych_model_wakes_total", model=self.name)
        described = await self._reach_all()
        load_s = self._clock() - self._woken_at
        logger.info("the model %s is awake after %.1f s", self.name, load_s)
        self.loads += 1
        self._last = "ready"
        self._used_at = self._clock()
        self.described = described
        await self.keep(description=described, **({"load_s": load_s} if is_measured else {}))
        self.on_awake()

    async def _reach_all(self) -> StageDescription:
        """What the first of the stages says of itself, when all are there."""
        while True:
            described = await asyncio.gather(*map(self._reach, self.handles.values()))
            told = await self._states.read(or_last=False) if self._states else {}
            if not {told.get(name) for name in self.handles}.intersection(RESTING):
                return described[0].of(self.name)
            await asyncio.sleep(PAUSE_S)  # one that was just going has answered

    async def _reach(self, handle: DeploymentHandle) -> StageDescription:
        while True:
            try:
                answer: StageDescription = await handle.describe.remote()
            except (RayError, RayServeException) as error:  # its replica died, or could not be started yet
                logger.warning("%s is woken again: %s", handle.deployment_name, type(error).__name__)
                await asyncio.sleep(PAUSE_S)
            else:
                return answer

    # --- what is told ---

    def about_s(self) -> float | None:
        """Seconds until it can serve, by its last load; None where none was measured."""
        load_s = self._facts.load_s if self._facts else None
        if load_s is None or not self._is_waking:
            return load_s
        return max(0.0, load_s - self._loading_s)

    @property
    def _loading_s(self) -> float:
        return self._clock() - self._woken_at

    def words(self) -> str:
        """For callers, in a sentence of its own."""
        load_s = self._facts.load_s if self._facts else None
        measured = (
            "how long this takes was not measured yet" if load_s is None else f"the last load took {load_s:.0f} s"
        )
        if self._is_waking:
            return f"the model {self.name!r} was asleep and is loading, for {self._loading_s:.0f} s now; {measured}"
        return f"the model {self.name!r} is asleep, and is loaded when a request comes; {measured}"

    def refusal(self) -> ModelLoadingError:
        """Says when to come back."""
        about_s = self.about_s()
        retry_s = UNKNOWN_RETRY_S if about_s is None else max(SHORTEST_RETRY_S, math.ceil(about_s))
        return ModelLoadingError(f"{self.words()}; try again in {retry_s} s, or ask for a job", retry_s)

    # --- what is known while it sleeps ---

    async def facts(self, again: bool = False) -> Facts:
        if self._facts is None or again:
            read = await self._store.read() if self._store else None
            self._facts = read if read is not None and read != Facts() else self._facts or Facts()
        return self._facts

    async def keep(self, **changes: Any) -> None:
        """Changes of the Facts; written where they are new."""
        before = await self.facts()
        self._facts = replace(before, **changes)
        if self._store is not None and self._facts != before:
            await self._store.write(self._facts)
