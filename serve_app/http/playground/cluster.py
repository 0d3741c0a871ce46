"""What the cluster does, second by second: one look for all who watch, as long as there are any."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import TriptychError
from serve_app.errors import OverloadedError
from serve_app.jobs.service import Jobs
from serve_app.making.health import resting_stages
from serve_app.models.registry import ServedModels

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks
LOOK_AT_S = 0.01  # for each replica: a large fleet is looked at less often, at most 100 replicas a second
ANSWER_S = 3.0  # that the replicas of a deployment may take to answer
# That one may watch: an ingress replica that is to go waits for nobody longer, and whoever stays asks again.
WATCH_S = 30.0
MOST_WATCHERS = 100
MOST_REQUESTS = 32  # shown of a replica
OLD_S = 10.0  # what was seen so long ago says nothing of this second

Seen = dict[str, Any]  # what is sent, as JSON has it
Activity = Mapping[str, Any]  # of a replica: deployments.replicas.dev.Inside.activity


@dataclass(eq=False)
class Watcher:
    """Somebody who watches: only what was seen last waits for them."""

    latest: Seen | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, seen: Seen) -> None:
        self.latest = seen
        self.arrived.set()


class ClusterWatch:
    """Asks every replica of the stages what it does, and tells it to all who watch."""

    def __init__(self, models: ServedModels, jobs: Jobs, look_s: float = LOOK_S, watch_s: float = WATCH_S) -> None:
        self.models = models
        self.jobs = jobs
        self.look_s = look_s
        self.watch_s = watch_s
        self._watchers: set[Watcher] = set()
        self._looking: asyncio.Task[None] | None = None
        self._before: dict[str, tuple[float, Activity]] = {}  # by replica, with time.monotonic()

    def watch(self) -> AsyncIterator[Seen | None]:
        """What is seen, as it is seen, for `watch_s` seconds; None is a sign of life. Raises OverloadedError."""
        if len(self._watchers) >= MOST_WATCHERS:
            raise OverloadedError(f"{MOST_WATCHERS} others watch the cluster; try again in 5 s", 5)
        return self._watch()

    async def _watch(self) -> AsyncIterator[Seen | None]:
        watcher = Watcher()
        self._watchers.add(watcher)
        if self._looking is None or self._looking.done():
            # An empty context: Serve cancels what belongs to the context of a request that has ended.
            self._looking = asyncio.get_running_loop().create_task(self._look_on(), context=contextvars.Context())
        ends = time.monotonic() + self.watch_s
        try:
            while time.monotonic() < ends:
                try:
                    await asyncio.wait_for(watcher.arrived.wait(), ANSWER_S)
                except TimeoutError:
                    yield None
                    continue
                watcher.arrived.clear()
                yield watcher.latest
        finally:
            self._watchers.remove(watcher)

    async def _look_on(self) -> None:
        while self._watchers:
            try:
                seen = await self.look()
            except Exception:  # if this ended, those who watch would see nothing any more
                logger.exception("the cluster could not be looked at; trying again")
            else:
                for watcher in self._watchers:
                    watcher.tell(seen)
            await asyncio.sleep(max(self.look_s, LOOK_AT_S * len(self._before)))

    async def look(self) -> Seen:
        """What waits here, and every deployment with its replicas."""
        handles = self.models.deployments()
        whose = {name: model.name for model in self.models.all() for name in model.stages.deployments()}
        admissions = [model.admission for model in self.models.all()]
        resting = await resting_stages(self.models.stages())
        answers = await asyncio.gather(
            *(_told(resting[name]) if name in resting else _ask(handle) for name, handle in handles.items())
        )
        now = time.monotonic()
        deployments = [
            {"model": whose[name]} | self._deployment(name, answer, now)
            for name, answer in zip(handles, answers, strict=True)
        ]
        self._before = {key: each for key, each in self._before.items() if now - each[0] < OLD_S}
        return {
            "at": time.time(),
            "waiting": {
                "let_in": sum(each.num_pending for each in admissions),
                "queue_s": round(max(each.queue_s() for each in admissions), 1),  # each model has its own devices
                "jobs": await self._jobs(),
            },
            "deployments": deployments,
        }

    async def _jobs(self) -> dict[str, int] | None:
        """Of the application, whichever replica took them; None where the store does not answer."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self.jobs.counts()
        except (TimeoutError, TriptychError):
            return None

    def _deployment(self, name: str, answer: list[Activity] | str, now: float) -> Seen:
        if isinstance(answer, str):
            return {"name": name, "trouble": answer, "replicas": []}
        replicas = [self._replica(each, now) for each in sorted(answer, key=lambda each: str(each["replica_id"]))]
        return {"name": name, "trouble": None, "replicas": replicas}

    def _replica(self, activity: Activity, now: float) -> Seen:
        """What it has, and what it did since the look before."""
        replica_id = str(activity["replica_id"])
        before_at, before = self._before.get(replica_id, (now, activity))
        self._before[replica_id] = now, activity
        requests = [_request(each) for each in activity["requests"]]
        return {
            "id": short_name(replica_id),
            "stages": [
                {
                    "stage": stage,
                    "busy": _busy(load, before["loads"].get(stage, load), now - before_at),
                    "present": load["present"],
                    "arrived": load["arrived"],
                    "request_s": round(load["request_s"], 3),
                    "requests": [each for each in requests if each["stage"] == stage][:MOST_REQUESTS],
                }
                for stage, load in activity["loads"].items()
            ],
            "batches": _batches(activity["engine"], before["engine"]),
        }


async def _told(words: str) -> list[Activity] | str:
    """Of a deployment that sleeps."""
    return words


async def _ask(handle: DeploymentHandle) -> list[Activity] | str:
    """What each replica does, or why that is not known."""
    try:
        async with asyncio.timeout(ANSWER_S + 1.0):
            answers: list[Activity] = await handle.broadcast("activity").results_async(timeout_s=ANSWER_S)
    except (TimeoutError, RayError, RayServeException, TriptychError, RuntimeError):  # the last: no replica is known
        return "no answer: it is loading, busy, or down"
    return answers if answers else "no replica is running"


def short_name(name: str) -> str:
    """For a request or a replica: the same wherever it is seen, and of no use to ask for it."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _request(present: Mapping[str, Any]) -> Seen:
    told = ("stage", "state", "steps", "num_steps")
    since_s = round(present["since_s"], 1)
    return {"id": short_name(present["request_id"]), "since_s": since_s} | {name: present[name] for name in told}


def _busy(load: Mapping[str, float], before: Mapping[str, float], passed_s: float) -> float | None:
    """The share of the time since the look before; None at the first."""
    if passed_s <= 0:
        return None
    return round(min(1.0, max(0.0, (load["busy_s"] - before["busy_s"]) / passed_s)), 3)


def _batches(engine: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> list[Seen] | None:
    """How many batches of each size the engine ran since the look before; None without an engine."""
    if engine is None:
        return None
    known = {int(size): count for size, count in (before or engine)["batch_sizes"].items()}
    new = {int(size): count - known.get(int(size), 0) for size, count in engine["batch_sizes"].items()}
    return [{"size": size, "count": count} for size, count in sorted(new.items()) if count > 0]
