"""Ends the requests whose owner is gone, so that no accelerator works for nobody.

Ray lets the call of an actor go on when its caller dies. The owner of a request is the Ray actor that asked for
it (a replica of the ingress); jobs of an ingress that died are taken over, with a request of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from ray.util import list_named_actors

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 3.0


def living_actors() -> set[str]:
    """The names of all actors. The replica's own namespace is that of whoever started Serve; replicas are elsewhere."""
    return {actor["name"] for actor in list_named_actors(all_namespaces=True)}


class OwnerWatch:
    """Of one replica; it asks Ray who lives, once for all requests and only while there are any."""

    def __init__(self, living: Callable[[], set[str]] = living_actors, every_s: float = CHECK_EVERY_S) -> None:
        self._living = living
        self._every_s = every_s
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}
        self._seen: set[str] = set()  # owners that were alive once
        self._watching: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def bound_to(self, owner: str) -> Iterator[None]:
        """Cancels the current task when the actor of this name is gone; "" is an owner that nobody watches."""
        task = asyncio.current_task()
        if not owner or task is None:
            yield
            return
        tasks = self._tasks.setdefault(owner, set())
        tasks.add(task)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks and self._tasks.get(owner) is tasks:
                del self._tasks[owner]

    async def _watch(self) -> None:
        missing: set[str] = set()
        while self._tasks:
            try:
                living = await asyncio.to_thread(self._living)
            except Exception as error:  # noqa: BLE001  (Ray's control store is away: that says nothing of the owners)
                logger.warning("who owns the requests cannot be asked: %r", error)
                await asyncio.sleep(self._every_s)
                continue
            self._seen |= self._tasks.keys() & living
            absent = (self._tasks.keys() & self._seen) - living  # one that was never seen may be invisible here
            for owner in absent & missing:  # twice in a row: one look may come while the control store starts again
                tasks = self._tasks.pop(owner)
                logger.warning("%d requests are ended: %s, which asked for them, is gone", len(tasks), owner)
                for task in tasks:
                    task.cancel()
            missing = absent - missing
            await asyncio.sleep(self._every_s)
