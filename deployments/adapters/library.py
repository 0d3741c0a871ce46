"""The adapters of one process: fetched and converted once, in the modules' layers while they are used, on the host and
on the disk after that, each under a byte budget.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from deployments.adapters.args import AdapterCacheArgs
from deployments.adapters.convert import Converter, Part
from deployments.adapters.fetch import AdapterFile, fetch_file, refusal
from deployments.adapters.formats import check_file
from deployments.adapters.forward import why_not
from deployments.adapters.inject import eject, inject
from deployments.adapters.tier import Tier
from deployments.adapters.use import FEATURE, AdapterUse
from deployments.errors import InvalidRequestError, NotSupportedError, StageUnavailableError
from deployments.stage_pipeline.loading import StagePipeline
from deployments.tensors.out_of_memory import is_out_of_memory, let_go

logger = logging.getLogger(__name__)

NAME_LENGTH = 16  # of the digest's characters in the name of an adapter's layers

Key = tuple[str, str | None]  # digest, the component that it was told to go into


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter on the host, converted to what each component's loader takes."""

    digest: str  # SHA-256 of its file
    parts: Mapping[str, Part]  # by component, those of other processes too
    num_bytes: int  # on this host
    file_bytes: int

    @property
    def components(self) -> frozenset[str]:
        return frozenset(self.parts)

    def without_tensors(self) -> FetchedAdapter:
        return replace(self, parts={name: part.without_tensors() for name, part in self.parts.items()})

    def describe(self) -> dict[str, Any]:
        """As plain values; ranks and layers by component."""
        return {
            "digest": self.digest,
            "num_bytes": self.file_bytes,
            "components": sorted(self.parts),
            "rank": max((rank for part in self.parts.values() for rank in part.ranks), default=None),
            "ranks": {name: list(part.ranks) for name, part in self.parts.items()},
            "layers": {name: part.num_layers for name, part in self.parts.items()},
            "alphas": {name: part.has_alphas for name, part in self.parts.items()},
        }

    @property
    def peft_name(self) -> str:
        """Of its layers in every module; it follows from the file's content."""
        return f"a{self.digest[:NAME_LENGTH]}"


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter whose layers are in modules of this process, for as long as it is held."""

    peft_name: str
    components: frozenset[str]  # of those that were asked for
    use: AdapterUse


@dataclass
class Loads:
    """What loading has been for: counts, and the seconds since they were last taken, by the tier that was loaded."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[str, float]] = field(default_factory=list)


class AdapterLibrary:
    """Of one stage's process. `fetched` for any thread, `holding` for the thread that owns the modules' forwards."""

    def __init__(
        self,
        stage: StagePipeline,
        args: AdapterCacheArgs,
        cache_root: Path,
        clock: Callable[[], float] = time.monotonic,
        obstacle: str | None = None,
    ) -> None:
        """`obstacle`: why no adapter may be used whatever the modules are; None: there is no such reason."""
        self._obstacle = obstacle
        self._pipeline, self._device = stage.pipeline, stage.device
        self._compiled, self._memory = stage.switches, stage.memory
        self._denoisers = frozenset(stage.layout.denoisers)
        self._here = frozenset(stage.components)
        self._converter = Converter(stage.pipeline, stage.layout)
        self._args, self._cache_root, self._clock = args, cache_root, clock
        self._obstacles = {
            name: why
            for name in self._converter.loadable
            if name in self._here and (why := obstacle_of(stage.components[name], stage.precisions.get(name)))
        } | {name: f"it is {other} too, see `share`" for name, other in stage.shared.items()}
        self._lock = threading.Lock()  # of the tables; held for moments
        self._host: Tier[Key, FetchedAdapter] = Tier(args.max_host_bytes)
        # A component's layers are changed in one thread only: each has a tier of its own, of one budget.
        self._device_tiers: dict[str, Tier[str, str]] = {name: Tier(args.max_device_bytes) for name in self._here}
        self._in_use: WeakValueDictionary[Key, FetchedAdapter] = WeakValueDictionary()  # the host may be too small
        self._known: dict[tuple[str, str | None, str], AdapterFile] = {}  # files that may be replaced where they lie
        self._under_way: dict[AdapterUse, Future[FetchedAdapter]] = {}
        self._shells: dict[Key, FetchedAdapter] = {}  # what adapters are, without their numbers
        self._forgotten: set[str] = set()  # names of layers that go when their thread comes by
        self.loads = Loads()

    def why_none(self) -> str | None:
        """Why this process can put no adapter into any model; None: it can."""
        if self._obstacle is not None:
            return self._obstacle
        if not self.loadable:
            return f"{type(self._pipeline).__name__} takes no LoRA"
        blocked = [f"{name}: {why}" for name, why in self._obstacles.items() if name in self._denoisers]
        return "; ".join(blocked) or None

    @property
    def takes_adapters(self) -> bool:
        return self.why_none() is None

    @property
    def loadable(self) -> tuple[str, ...]:
        """Components that can have adapters; empty: the pipeline takes none."""
        return self._converter.loadable

    # -- the host ----------------------------------------------------------------------------------------------

    def fetched(self, use: AdapterUse) -> FetchedAdapter:
        """The adapter on the host, from there or from its place; requests for the same one wait for one load.

        Raises InvalidRequestError (param "loras") for what does not fit the model, StageUnavailableError for a place
        that cannot be reached now.
        """
        with self._lock:
            key = self._known_key(use)
            if key is not None and (kept := self._kept(key)) is not None:
                return kept
            wanted = AdapterUse(use.name, use.path, use.weight_name, component=use.component, digest=use.digest)
            loading = self._under_way.get(wanted)
            if is_first := loading is None:
                loading = self._under_way[wanted] = Future()
        if not is_first:
            return loading.result()
        try:
            adapter = self._load(use)
        except BaseException as error:
            loading.set_exception(error)
            raise
        else:
            loading.set_result(adapter)
            return adapter
        finally:
            with self._lock:
                del self._under_way[wanted]

    def _kept(self, key: Key) -> FetchedAdapter | None:
        """On the host: within its budget, or for those who use it. With the lock."""
        kept = self._host.get(key) or self._in_use.get(key)
        if kept is not None:
            self.loads.hits["host"] += 1
        return kept

    def _known_key(self, use: AdapterUse) -> Key | None:
        """None where its place must be looked at: its digest is not known, or it is a file here that was changed."""
        if use.digest:
            return use.digest, use.component
        known = self._known.get((use.path, use.weight_name, use.component or ""))
        return (known.digest, use.component) if known is not None and known.is_as_it_was else None

    def _load(self, use: AdapterUse) -> FetchedAdapter:
        started = self._clock()
        file = fetch_file(use, self._cache_root, self._args.max_disk_bytes)
        with self._lock:
            if (kept := self._kept((file.digest, use.component))) is not None:
                self._note_place(use, file)
                return kept
        parts = self._converted(use, file)
        self._refuse_obstacles(use, parts)
        # Parts of other processes are known by their names alone.
        own = {name: part if name in self._here else part.without_tensors() for name, part in parts.items()}
        adapter = FetchedAdapter(file.digest, own, sum(part.num_bytes for part in own.values()), file.num_bytes)
        with self._lock:
            self._note_place(use, file)
            self._in_use[file.digest, use.component] = adapter
            self.loads.misses["host"] += 1
            self.loads.seconds.append(("host", self._clock() - started))
            for gone, _ in self._host.too_many(adapter.num_bytes):
                self._host.remove(gone)
                self.loads.evictions["host"] += 1
            self._shells[file.digest, use.component] = adapter.without_tensors()
            if adapter.num_bytes <= self._host.max_bytes:
                self._host.put((file.digest, use.component), adapter, adapter.num_bytes)
        return adapter

    def _note_place(self, use: AdapterUse, file: AdapterFile) -> None:
        if file.stamp is not None:
            self._known[use.path, use.weight_name, use.component or ""] = file

    def _converted(self, use: AdapterUse, file: AdapterFile) -> dict[str, Part]:
        """By component. What is found in a file that is being replaced, or has gone, is nobody's fault."""
        try:
            check_file(use, file.path)
            parts = self._converter.parts(use, file.path)
        except InvalidRequestError:
            if file.is_as_it_was:
                raise
        else:
            if file.is_as_it_was:
                return parts
        raise StageUnavailableError(f"the file of the adapter {use.name!r} is being replaced; try again")

    def _refuse_obstacles(self, use: AdapterUse, components: Collection[str]) -> None:
        for name in components:
            if name in self._obstacles:
                raise NotSupportedError(
                    f"the adapter {use.name!r} has layers for {name}, which takes none: {self._obstacles[name]}",
                    FEATURE,
                )

    # -- the device --------------------------------------------------------------------------------------------

    @contextmanager
    def holding(
        self, uses: Sequence[AdapterUse], components: Collection[str] | None = None
    ) -> Iterator[tuple[HeldAdapter, ...]]:
        """The adapters' layers are in those of the components (None: the denoisers) that are here, until the end.

        Nothing of the components may run meanwhile in another thread. Raises as `fetched`.
        """
        asked = (self._denoisers if components is None else frozenset(components)) & self._here
        pinned: list[tuple[str, str]] = []
        try:
            held = []
            for use in uses:
                adapter = self._in_layers(use, asked) or self.fetched(use)
                here = asked & adapter.components
                for name in sorted(here):
                    self._put_in(use, adapter, name)
                    pinned.append((name, adapter.peft_name))
                held.append(HeldAdapter(adapter.peft_name, here, use))
            yield tuple(held)
        finally:
            with self._lock:
                for name, layers in pinned:
                    self._device_tiers[name].unpin(layers)
            for name in dict(pinned):
                self._remove_forgotten(name)

    def _in_layers(self, use: AdapterUse, asked: frozenset[str]) -> FetchedAdapter | None:
        """Without its numbers, where all that is asked for is on the device: the host may have it no more."""
        with self._lock:
            key = self._known_key(use)
            shell = None if key is None else self._shells.get(key)
            if shell is None or any(shell.peft_name not in self._device_tiers[n] for n in asked & shell.components):
                return None
            return shell

    def _put_in(self, use: AdapterUse, adapter: FetchedAdapter, name: str) -> None:
        """Pinned. In the thread that owns the component."""
        tier, layers = self._device_tiers[name], adapter.peft_name
        with self._lock:
            self._forgotten.discard(layers)
        self._remove_forgotten(name)
        with self._lock:
            if tier.get(layers) is not None:
                self.loads.hits["device"] += 1
                tier.pin(layers)
                return
        component: Any = getattr(self._pipeline, name)
        part, started = adapter.parts[name], self._clock()
        self._make_room(name, part.num_elements * element_size(component))
        try:
            num_bytes = self._injected(name, part, layers)
        except Exception as raised:
            error = cause_of(raised)
            if is_out_of_memory(error):
                raise error from None
            logger.warning("the adapter %s cannot be put into %s", use.name, name, exc_info=True)
            raise refusal(use, f"its layers cannot be put into {name} ({type(component).__name__}): {error}") from error
        with self._lock:
            tier.put(layers, adapter.digest, num_bytes)
            tier.pin(layers)
            self.loads.misses["device"] += 1
            self.loads.seconds.append(("device", self._clock() - started))

    def _injected(self, name: str, part: Part, layers: str) -> int:
        """The bytes of the layers. Where memory was lacking, once more without what nobody uses."""
        component: Any = getattr(self._pipeline, name)
        try:
            return inject(component, part, layers, self._device)
        except Exception as error:
            if not is_out_of_memory(cause_of(error)):
                raise
            let_go(error)
        # Outside of the block, whose error holds what was put in so far.
        self.evict_idle([name])
        self._memory.free()
        return inject(component, part, layers, self._device)

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Of the component's own adapters, those used longest ago go, until all that this process has fit."""
        with self._lock:
            tier = self._device_tiers[name]
            others = sum(each.num_bytes for each in self._device_tiers.values()) - tier.num_bytes
            gone = [layers for layers, _ in tier.too_many(num_bytes + others)]
        for layers in gone:
            self._take_out(name, layers)

    def _take_out(self, name: str, layers: str) -> None:
        eject(getattr(self._pipeline, name), layers, keeps_layers=name in self._compiled)
        with self._lock:
            self._device_tiers[name].remove(layers)
            self.loads.evictions["device"] += 1

    def _remove_forgotten(self, name: str) -> None:
        with self._lock:
            tier = self._device_tiers[name]
            gone = [layers for layers in self._forgotten if layers in tier and not tier.is_pinned(layers)]
        for layers in gone:
            self._take_out(name, layers)
        with self._lock:
            self._forgotten -= {
                layers for layers in gone if not any(layers in each for each in self._device_tiers.values())
            }

    # -- what others ask ---------------------------------------------------------------------------------------

    def forget(self, digest: str) -> None:
        """Its memory is given back: the host's now, the device's when the thread of its component comes by next."""
        with self._lock:
            for key, adapter in self._host.items():
                if key[0] == digest:
                    self._host.remove(key)
                    self._forgotten.add(adapter.peft_name)
            self._forgotten |= {
                layers for tier in self._device_tiers.values() for layers, of in tier.items() if of == digest
            }
            self._known = {place: known for place, known in self._known.items() if known.digest != digest}
            self._shells = {key: shell for key, shell in self._shells.items() if key[0] != digest}

    def give_back(self, components: Collection[str]) -> None:
        """What was forgotten leaves the layers of these components. In the thread that owns them."""
        for name in self._here & frozenset(components):
            self._remove_forgotten(name)

    def evict_idle(self, components: Collection[str]) -> None:
        """All adapters that no request uses leave the layers of these components. In the thread that owns them."""
        for name in self._here & frozenset(components):
            with self._lock:
                tier = self._device_tiers[name]
                gone = [layers for layers, _ in tier.items() if not tier.is_pinned(layers)]
            for layers in gone:
                self._take_out(name, layers)

    def held(self) -> tuple[str, ...]:
        """The digests of the adapters that are in memory."""
        with self._lock:
            on_device = [of for tier in self._device_tiers.values() for _, of in tier.items()]
            return tuple(dict.fromkeys([*on_device, *(key[0] for key, _ in self._host.items())]))

    def describe(self) -> dict[str, Any]:
        """Counts and bytes by tier, as plain values."""
        with self._lock:
            tiers = list(self._device_tiers.values())
            on_device = {layers for tier in tiers for layers, _ in tier.items()}
            return {
                "device": {
                    "adapters": len(on_device),
                    "bytes": sum(tier.num_bytes for tier in tiers),
                    "max_bytes": self._args.max_device_bytes,
                },
                "host": {"adapters": len(self._host), "bytes": self._host.num_bytes, "max_bytes": self._host.max_bytes},
                "hits": dict(self.loads.hits),
                "misses": dict(self.loads.misses),
                "evictions": dict(self.loads.evictions),
            }

    def take_seconds(self) -> list[tuple[str, float]]:
        """Of the loads since the last call: the tier that was loaded, and the seconds that it took."""
        with self._lock:
            taken, self.loads.seconds = self.loads.seconds, []
            return taken


def cause_of(error: Exception) -> Exception:
    """Without the KeyError that diffusers raises on its way out of a loading that has failed."""
    cause = error.__context__
    return cause if isinstance(error, KeyError) and isinstance(cause, Exception) else error


def obstacle_of(component: torch.nn.Module, precision: str | None) -> str | None:
    """Why it can have no adapters as it is held, `precision` in words; None: it can."""
    why = why_not(component)
    return f"{why}; it is held as {precision}: another precision is allowed" if why and precision else why


def element_size(component: torch.nn.Module) -> int:
    """Bytes of a number of an adapter's layers, which have the dtype of the weights beside them."""
    floating = [parameter.element_size() for parameter in component.parameters() if parameter.is_floating_point()]
    return max(floating, default=4)
