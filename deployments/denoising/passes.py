"""The guidance passes of one request: forwards of a step that its pipeline makes one after the other, as one batch.

A pipeline that asks for the next pass before it uses the numbers of the last one is given a promise of those. Both
passes then wait for the device together, where the engine merges them as it merges forwards of different requests.
Whether a pipeline does that is seen in the first step that makes such a pass, for each place in a step: there the
output is made at once, and watched. A promise whose numbers are used before the next pass comes (guidance may end) is
kept at once, by a forward of its own.

What is promised hangs on what the request has shown alone, and a checkpoint holds it: a request that goes on from there
makes the same passes together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.cache_utils import CacheMixin

from deployments.engine.engine import Engine
from deployments.engine.executor import CacheContext
from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward, PerSample, Surround, bind, without_defaults
from deployments.errors import PassesApartError
from deployments.tensors.promise import Source
from deployments.tensors.values import PLAIN, PORTABLE, describe, leaves, map_values
from deployments.tensors.watched import Watched

# Of a pass's output: not known; after the next pass of the step; before it; in the last pass of the step.
Use = Literal["unknown", "later", "before", "last"]
Settings = tuple[Surround | None, Hashable | None, bool, PerSample | None]  # those of Engine.run, from `surround` on


@dataclass
class Place:
    """A pass in a step: the how manyth it is, of which denoiser, with arguments of which shapes."""

    use: Use = "unknown"
    output: Any = None  # described


@dataclass(eq=False)
class Pass:
    """The newest pass of a step, or one before it whose output is promised."""

    place: Place
    given: Watched  # its arguments
    source: Source | None = None  # of what the pipeline was given, where that is promised or watched
    asked: Forward | None = None  # where it is promised


@dataclass
class GuidancePassesOfRequest:
    """`waiting` is entered where other code may run meanwhile; `places` are those of a checkpoint."""

    engine: Engine
    fiber: Fiber
    device: torch.device
    steps_done: Callable[[], int]
    waiting: Callable[[], AbstractContextManager[None]]
    places: dict[str, Place] = field(default_factory=dict)
    _step: int = -1
    _index: int = 0
    _newest: Pass | None = None  # of this step
    _promised: list[Pass] = field(default_factory=list)
    _names_passes: dict[str, bool] = field(default_factory=dict)  # by component

    def __post_init__(self) -> None:
        self.device = torch.empty(0, device=self.device).device  # with its number, as those of a pipeline's tensors

    def forward(
        self, module: Any, component: str, context: CacheContext | None, args: Any, kwargs: Any, settings: Settings
    ) -> Any:
        """As Engine.run; the output may be promises.

        Raises PassesApartError where the pipeline or the module writes into the arguments of a pass that waits.
        """
        if self.steps_done() != self._step:
            self.end_step()
        self._note_that_another_follows()
        surround, merge_key, _, per_sample = settings
        if surround is not None or merge_key != () or self._keeps_state_by_name(component, module):
            return self._made_at_once(self.engine.ask(self.fiber, module, component, context, args, kwargs, *settings))
        arguments = without_defaults(module, bind(module, args, kwargs))  # which pipelines give in one pass alone
        place, given = self._place(component, arguments), Watched(arguments)
        asked = self.engine.ask(self.fiber, module, component, None, (), arguments, per_sample=per_sample)
        if asked.structure.is_alone:
            return self._made_at_once(asked)
        self._newest = Pass(place, given)
        if place.use == "later":
            return self._promise(self._newest, asked)
        output = self._made_at_once(asked, self._to_be_joined(place, component))
        return self._watch(self._newest, output) if place.use == "unknown" else output

    def end_step(self) -> None:
        """A step was made. Raises as `forward` does."""
        newest, self._newest = self._newest, None
        if newest is not None and newest.source is not None and newest.asked is None:
            newest.source.close()
            newest.place.use = "last"
        while self._promised:  # nobody has used their numbers yet
            self._make(self._promised[0])
        self._step, self._index = self.steps_done(), 0

    def end(self) -> None:
        """Of the request: nothing is promised any more."""
        self._newest, self._promised = None, []

    def snapshot(self) -> dict[str, Any]:
        """What was seen, for `places_of`."""
        return {key: [place.use, place.output] for key, place in self.places.items()}

    def _note_that_another_follows(self) -> None:
        newest = self._newest
        if newest is None:
            return
        is_written = newest.given.is_written() or bool(newest.given.counted())
        if newest.asked is not None and newest in self._promised:
            if is_written:
                raise PassesApartError("the pipeline writes into what it has given to a guidance pass")
        elif newest.source is not None and newest.asked is None:
            newest.source.close()
            newest.place.use = "before" if newest.source.is_used or is_written else "later"
        elif newest.place.use == "last":  # guidance has begun
            newest.place.use = "unknown"
        self._newest = None

    def _to_be_joined(self, place: Place, component: str) -> list[Pass]:
        """What is promised of other denoisers, such as that which a ControlNet's pass comes before: another pass of the
        step may yet share its batch."""
        if place.use == "last":
            return []
        return [each for each in self._promised if forward_of(each).component != component]

    def _made_at_once(self, asked: Forward, still_promised: Sequence[Pass] = ()) -> Any:
        """With those that were promised before it, in its batch or alone, but for `still_promised`."""
        output = self.engine.wait(asked, [forward_of(each) for each in still_promised])
        promised, self._promised = self._promised, list(still_promised)
        for each in promised:
            if each not in still_promised:
                self._keep(each, self.engine.wait(forward_of(each), [forward_of(other) for other in still_promised]))
        return output

    def _promise(self, newest: Pass, asked: Forward) -> Any:
        newest.asked, newest.source = asked, Source(lambda: self._make(newest))
        self._promised.append(newest)
        return newest.source.promised(newest.place.output, self.device)

    def _make(self, promised: Pass) -> None:
        """Its numbers are needed where no other request can go on: in an operation of the pipeline's."""
        self._promised.remove(promised)
        promised.place.use = "last"
        if promised.given.is_written():
            raise PassesApartError("the pipeline writes into what it has given to a guidance pass")
        with self.waiting():
            output = self.engine.make(forward_of(promised))
        self._keep(promised, output)

    def _keep(self, promised: Pass, output: Any) -> None:
        if promised.given.is_written() or promised.given.counted():
            raise PassesApartError("a denoiser writes into what a guidance pass is given")
        assert promised.source is not None
        promised.source.keep(output)

    def _watch(self, newest: Pass, output: Any) -> Any:
        """The output of a pass whose place is not known, as promises that are kept."""
        if newest.given.is_written() or newest.given.counted() or not can_be_promised(output):
            newest.place.use = "before"
            return output
        newest.place.output, newest.source = describe(output), Source()
        return newest.source.watched(output)

    def _place(self, component: str, arguments: dict[str, Any]) -> Place:
        key = f"{self._index} {component} {key_of(arguments)}"
        self._index += 1
        return self.places.setdefault(key, Place())

    def _keeps_state_by_name(self, component: str, module: Any) -> bool:
        """Whether the pass must be made under the name that the pipeline gives it."""
        if component not in self._names_passes:
            self._names_passes[component] = keeps_state_by_name(module)
        return self._names_passes[component]


def places_of(snapshot: Mapping[str, Any] | None) -> dict[str, Place]:
    return {key: Place(use, output) for key, (use, output) in (snapshot or {}).items()}


def forward_of(promised: Pass) -> Forward:
    assert promised.asked is not None
    return promised.asked


def can_be_promised(output: Any) -> bool:
    """Whether its shape is all that a pipeline can ask for without its numbers."""
    return all(
        leaf.is_floating_point() if isinstance(leaf, torch.Tensor) else isinstance(leaf, PORTABLE)
        for leaf in leaves(output)
    )


def key_of(arguments: Mapping[str, Any]) -> str:
    """Equal for arguments that give an output of the same shape."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), str(value.dtype)
        is_number = isinstance(value, float)  # a time step or a scale
        return value if isinstance(value, PLAIN) and not is_number else type(value).__name__

    return repr(map_values(leaf, dict(sorted(arguments.items()))))


def keeps_state_by_name(module: torch.nn.Module) -> bool:
    """Whether something in it keeps state for each `cache_context` that pipelines enter: a cache of diffusers."""
    if getattr(type(module), "cache_context", CacheMixin.cache_context) is not CacheMixin.cache_context:
        return True
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook._is_stateful for registry in registries if registry is not None for hook in registry.hooks.values())
