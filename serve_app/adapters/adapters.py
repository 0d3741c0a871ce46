"""The LoRAs of an application: which there are, what a request's names stand for, how they come and go."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.adapters.args import AdapterArgs, Scale
from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError, NotSupportedError
from serve_app.adapters.places import SUFFIX, find, lies_in
from serve_app.adapters.reading import forget_adapter, read_adapter, replicas_that_hold
from serve_app.adapters.records import Facts, ServedAdapter
from serve_app.adapters.store import AdapterStore
from serve_app.errors import AdapterNotFoundError, ConflictError
from serve_app.jobs.threads import StoreThreads
from serve_app.making.stages import Stages
from serve_app.requests.limits import RequestLimits
from serve_app.requests.loras import AskedAdapter, check_scales

logger = logging.getLogger(__name__)

FRESH_S = 1.0  # so long, what was read in the store counts: another ingress replica may have added or deleted one
READ_AGAIN_S = 60.0  # a file of the configuration may be replaced
MOST_NAMES = 20  # in an error


@dataclass(frozen=True)
class NewAdapter:
    """What a caller adds."""

    name: str
    path: str
    weight_name: str | None = None
    component: str | None = None
    scale: Scale = 1.0


class Adapters:
    """Those of this ingress replica; the store has those that all share."""

    def __init__(
        self,
        configured: Mapping[str, AdapterArgs],
        places: Sequence[str],
        store: AdapterStore,
        stages: Stages,
        limits: RequestLimits,
    ) -> None:
        now = time.time()
        self.places = tuple(places)
        self._configured = {
            name: ServedAdapter(name, each.path, "configuration", each.weight_name, each.component, each.scale, now)
            for name, each in configured.items()
        }
        self._store = store
        self._threads = StoreThreads("adapter-store", max_threads=2)
        self._stages = stages
        self._limits = limits
        self._added: dict[str, ServedAdapter] = {}
        self._fresh_until = 0.0  # monotonic
        self._reading_store: asyncio.Task[dict[str, ServedAdapter]] | None = None
        self._read_at: dict[str, float] = {}  # monotonic: when a file of the configuration was read
        self._readings: dict[str, asyncio.Task[Facts]] = {}  # of files, under way
        self._forgetting: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        self._threads.close()

    # --- which there are ---

    async def all(self) -> list[ServedAdapter]:
        """Those of the configuration first. Raises JobStoreAwayError where others may have been added."""
        added = await self._read_store()
        return [*self._configured.values(), *(each for name, each in added.items() if name not in self._configured)]

    async def get(self, name: str, field: str = "name") -> ServedAdapter:
        """Raises AdapterNotFoundError that lists what is there, and JobStoreAwayError."""
        found = self._configured.get(name) or (await self._read_store()).get(name)
        found = found or (await self._read_store(again=True)).get(name)
        if found is None:
            raise AdapterNotFoundError(f"{field}: there is no LoRA {name[:80]!r} here, {await self._known()}", field)
        return found

    async def held(self) -> dict[str, dict[str, int]]:
        """See replicas_that_hold."""
        return await replicas_that_hold(self._stages)

    async def _known(self) -> str:
        names = [each.name for each in await self.all()]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return f"there are {', '.join(names[:MOST_NAMES])}{more}" if names else "there is none"

    async def _read_store(self, again: bool = False) -> dict[str, ServedAdapter]:
        """Where no place is allowed (any more), none was added."""
        if not self.places:
            return {}
        if again:
            return await self._read_store_now()
        if time.monotonic() < self._fresh_until:
            return self._added
        if self._reading_store is None or self._reading_store.done():
            reading, context = self._read_store_now(), contextvars.Context()
            self._reading_store = asyncio.get_running_loop().create_task(reading, context=context)
        return await asyncio.shield(self._reading_store)

    async def _read_store_now(self) -> dict[str, ServedAdapter]:
        added = await self._threads.run(self._store.all)
        self._added = {name: each for name, each in added.items() if lies_in(each.path, self.places)}
        self._fresh_until = time.monotonic() + FRESH_S
        return self._added

    # --- what a request's names stand for ---

    async def uses(self, asked: Sequence[AskedAdapter]) -> list[dict[str, Any]]:
        """What the stages are told of each.

        Raises AdapterNotFoundError, InvalidRequestError for a component that an adapter does not have, and what
        reading one raises.
        """
        uses = []
        for each in asked:
            adapter = await self.get(each.name, each.field)
            if not await self._stages.sleep.is_resting():  # reading it would wake the model
                self._read_soon(adapter)
            if isinstance(each.scale, Mapping):
                adapter = await self.with_facts(adapter, each.field)
                if adapter.facts is not None:  # else the stages say it
                    _check_components(adapter, each.scale, each.field)
            uses.append(adapter.use(each.scale))
        _check_that_none_is_twice(uses)
        return [use.plain() for use in uses]

    async def with_facts(self, adapter: ServedAdapter, field: str = "name") -> ServedAdapter:
        """The adapter with what is in its file, which is read if it was not, but not by waking a model that sleeps.

        Raises what `read_adapter` raises.
        """
        if adapter.facts is not None or await self._stages.sleep.is_resting():
            return adapter
        facts = await asyncio.shield(self._reading_of(adapter, field))
        return dataclasses.replace(adapter, facts=facts)

    def _read_soon(self, adapter: ServedAdapter) -> None:
        """So that later requests name the file's digest; the request itself does not wait."""
        now = time.monotonic()
        if adapter.source == "configuration" and now >= self._read_at.get(adapter.name, -READ_AGAIN_S) + READ_AGAIN_S:
            self._read_at[adapter.name] = now
            self._reading_of(adapter, "loras")

    def _reading_of(self, adapter: ServedAdapter, field: str) -> asyncio.Task[Facts]:
        """Under way once for all who wait."""
        reading = self._readings.get(adapter.name)
        if reading is None:
            # An empty context: it does not end with the HTTP request that began it.
            task = self._read(adapter, field)
            reading = asyncio.get_running_loop().create_task(task, context=contextvars.Context())
            self._readings[adapter.name] = reading
            reading.add_done_callback(lambda done: self._end_reading(adapter, done))
        return reading

    async def _read(self, adapter: ServedAdapter, field: str) -> Facts:
        return await read_adapter(self._stages, dataclasses.replace(adapter, facts=None).use(), field)

    def _end_reading(self, adapter: ServedAdapter, reading: asyncio.Task[Facts]) -> None:
        del self._readings[adapter.name]
        if reading.cancelled():
            return
        if error := reading.exception():
            logger.warning("the LoRA %s could not be read: %s", adapter.name, error)
        elif adapter.source == "configuration":
            self._configured[adapter.name] = dataclasses.replace(adapter, facts=reading.result())

    # --- how they come and go ---

    async def add(self, new: NewAdapter) -> ServedAdapter:
        """The LoRA, when a stage has read it and it is in the store; the one of before, where it is the same.

        Raises ConflictError for a name that is taken, NotSupportedError where nothing may be added, InvalidRequestError
        for a path outside of the places and for what does not fit the model, StageUnavailableError, JobStoreAwayError.
        """
        if not self.places:
            raise NotSupportedError("no LoRA can be added: adapter_places allows no place", "path")
        if new.name in self._configured:
            raise ConflictError(f"name: {new.name!r} is a LoRA of the configuration", "name", "name_taken")
        check_scales([AskedAdapter(new.name, new.scale, "scale")], self._limits)
        path = await asyncio.to_thread(find, new.path, new.weight_name, self.places)
        name = None if path.endswith(SUFFIX) else new.weight_name
        adapter = ServedAdapter(new.name, path, "added", name, new.component, new.scale, time.time())
        adapter = dataclasses.replace(adapter, facts=await read_adapter(self._stages, adapter.use(), "path"))
        if isinstance(new.scale, Mapping):
            _check_components(adapter, new.scale, "scale")
        added = await self._threads.run(self._store.add, adapter, self._limits.max_added_loras)
        self._fresh_until = 0.0
        return added

    async def remove(self, name: str) -> None:
        """Requests that have named it go on.

        Raises AdapterNotFoundError, ConflictError for one of the configuration, and JobStoreAwayError.
        """
        if name in self._configured:
            raise ConflictError(
                f"name: {name!r} is a LoRA of the configuration: take it out there", "name", "lora_configured"
            )
        await self.get(name)
        removed = await self._threads.run(self._store.remove, name)
        self._fresh_until = 0.0
        if removed is None:  # another ingress replica was quicker
            raise AdapterNotFoundError(f"name: there is no LoRA {name[:80]!r} here", "name")
        if removed.digest not in {each.digest for each in await self.all()}:
            forgetting = forget_adapter(self._stages, removed.digest)
            task = asyncio.get_running_loop().create_task(forgetting, context=contextvars.Context())
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)


def _check_components(adapter: ServedAdapter, scale: Mapping[str, float], field: str) -> None:
    known = adapter.facts.components if adapter.facts else ()
    if unknown := [name for name in scale if name not in known]:
        raise InvalidRequestError(
            f"{field}: the LoRA {adapter.name!r} changes {' and '.join(known)}, not {unknown[0][:80]!r}", field
        )


def _check_that_none_is_twice(uses: Sequence[AdapterUse]) -> None:
    """Two names may stand for one file, which no request can have at two scales."""
    known: dict[tuple[str, str | None], str] = {}
    for use in uses:
        first = known.setdefault((use.digest, use.component), use.name)
        if use.digest and first != use.name:
            raise InvalidRequestError(f"loras: {first!r} and {use.name!r} are the same file: name one of them", "loras")
