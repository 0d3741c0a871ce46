"""Which forwards of a denoiser are compiled: those of a structure that two requests have shown.

A lone request of an odd size never pays for a compilation. Called in the engine's thread, below no fiber: Dynamo and
the compiler run on that thread's own stack, and no fiber takes its turn meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from deployments.accelerations.compile import Path, Switch
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

STRUCTURES_KEPT = 4096
LONGEST_REASON = 300  # characters of a compiler's complaint
AS_IT_IS = ("as it is",)  # of a surrounded forward with no other key: it shares its costs with those of its kind

Call = Callable[[Any, str, Any, Any, Any], Any]  # module, component, cache context, args, kwargs
Axes = Mapping[Path, Any]  # the batch axis of each argument that has one
Surround = Callable[[], AbstractContextManager[None]]
Watch = Callable[[Hashable], AbstractContextManager[None]]  # around a work of some kind


class CompiledForwards:
    """Makes the forwards of a stage's denoisers, compiled or as they are.

    Compiled are those of a structure that two requests have shown, or one while a replica warms up; not those of
    deterministic requests, whose bits may not hang on what came before, nor forwards that a request's pipeline has
    rewired or differentiates through. A structure that cannot be compiled is told once, and runs as it is.
    """

    def __init__(
        self,
        switches: Mapping[str, Switch],
        call: Call,
        axes: Callable[[str], Axes | None] = lambda component: None,
        is_rewired: Callable[[Any], bool] = lambda module: False,
        watch: Watch = lambda kind: nullcontext(),
        layers: Callable[[Any], int] = lambda module: 0,
    ) -> None:
        """`call` makes a forward, `axes` are the learned ones of a component, `watch` is entered around a first one.

        `layers`: of a module those that were put in since its start; it is compiled again when there are more.
        """
        self._switches = switches
        self._call = call
        self._axes = axes
        self._is_rewired = is_rewired
        self._watch = watch
        self._layers = layers
        self._seen: dict[Hashable, str] = {}  # structures, and the first request that showed each
        self._common: set[Hashable] = set()
        self._refused: set[Hashable] = set()  # structures that cannot be compiled
        self._made: set[Hashable] = set()  # structures with their number of samples and of layers
        self._is_warming_up = False
        self._as_they_are = False
        self.compilation_s = 0.0  # so far: no measure of a forward

    # -- told by requests -----------------------------------------------------------------------------------------

    @property
    def settings(self) -> str:
        """What of it changes the numbers of requests that are not deterministic."""
        modes = sorted((name, switch.mode) for name, switch in self._switches.items())
        return repr(modes) if modes else ""

    def compiles(self, component: str) -> bool:
        """Whether its forwards may be compiled, so that `note` is to be told of them."""
        return component in self._switches

    def note(self, request_id: str, component: str, arguments: Mapping[str, Any]) -> None:
        """The request comes to a forward of these arguments."""
        structure = self._structure(component, arguments)
        if self._is_warming_up or self._seen.setdefault(structure, request_id) != request_id:
            self._common.add(structure)
        if len(self._seen) > STRUCTURES_KEPT:
            for known in (self._seen, self._common, self._refused, self._made):
                known.clear()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """What requests show meanwhile is compiled at once."""
        self._is_warming_up = True
        try:
            yield
        finally:
            self._is_warming_up = False

    def as_they_are(
        self, enter: Surround | None, merge_key: Hashable | None
    ) -> tuple[Surround | None, Hashable | None]:
        """What surrounds a forward, and its key, with which it is not compiled."""
        if not self._switches:
            return enter, merge_key

        @contextmanager
        def entered() -> Iterator[None]:
            self._as_they_are = True
            try:
                with enter() if enter else nullcontext():
                    yield
            finally:
                self._as_they_are = False

        return entered, AS_IT_IS if merge_key == () else merge_key

    # -- called by the engine -------------------------------------------------------------------------------------

    def __call__(self, module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        """The output of a forward of one or more samples; raises what the module raises."""
        switch = self._switches.get(component)
        if switch is None or self._as_they_are or self._is_rewired(module) or torch.is_grad_enabled():
            return self._call(module, component, context, args, kwargs)
        structure = self._structure(component, kwargs)
        if structure not in self._common or structure in self._refused:
            return self._call(module, component, context, args, kwargs)
        num_samples, axes = num_samples_of(kwargs, self._axes(component)), self._axes(component)
        kind = (structure, num_samples, self._layers(module))
        first = nullcontext() if kind in self._made else self._first(component, kind)
        try:
            with first, switched_on(switch, num_samples, axes):
                output = self._call(module, component, context, args, kwargs)
            self._made.add(kind)
            return output
        except compilers_errors() as error:
            raise_if_out_of_memory(error)
            reason = in_short(error)
        # Outside of the block: an error holds all tensors of the forward that it ended.
        output = self._call(module, component, context, args, kwargs)  # raises what is the module's own fault
        self._refused.add(structure)
        logger.warning("compile: forwards of %s of such a structure run as they are: %s", component, reason)
        return output

    def _structure(self, component: str, arguments: Mapping[str, Any]) -> Hashable:
        return component, structure_of(arguments, self._axes(component))

    @contextmanager
    def _first(self, component: str, kind: Hashable) -> Iterator[None]:
        """Around the first forward of a kind, which may compile for minutes."""
        started, before = time.monotonic(), graph_breaks()
        with self._watch(("compile", kind)), compilation_timed() as seconds:
            try:
                yield
            finally:  # all of it: the compiler is imported then, too
                self.compilation_s += time.monotonic() - started if seconds[0] else 0.0
        if not seconds[0]:
            return
        logger.info("compile: %s was compiled in %.1f s", component, seconds[0])
        if broken := graph_breaks() - before:
            reason, _ = broken.most_common(1)[0]
            told = " ".join(reason.split())[:LONGEST_REASON]
            logger.warning("compile: %d places in %s run as they are, such as: %s", broken.total(), component, told)


@contextmanager
def switched_on(switch: Switch, num_samples: int, axes: Axes | None) -> Iterator[None]:
    switch.is_on, switch.num_samples, switch.batch_axes = True, num_samples, axes
    try:
        yield
    finally:
        switch.is_on = False


@contextmanager
def compilation_timed() -> Iterator[list[float]]:
    """Of what is compiled meanwhile in this process, the seconds, in a list of one; known at the end."""
    from torch._dynamo.callback import CallbackArgs, callback_handler

    seconds, started = [0.0], [0.0]

    def start(_: CallbackArgs) -> None:
        started[0] = time.monotonic()

    def end(_: CallbackArgs) -> None:
        seconds[0] += time.monotonic() - started[0]

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield seconds
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


def graph_breaks() -> Counter[str]:
    """Places that could not be compiled so far, by their reasons."""
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def structure_of(arguments: Mapping[str, Any], axes: Axes | None) -> Hashable:
    """Equal for forwards of the same sizes, however many samples they have; without axes the first is the batch's."""
    return tuple((name, _structure(value, (name,), axes)) for name, value in sorted(arguments.items()))


def _structure(value: Any, path: Path, axes: Axes | None) -> Hashable:
    if isinstance(value, torch.Tensor):
        if value.ndim <= 1:  # time steps, one or one for each sample
            return value.dtype
        axis = 0 if axes is None else axes.get(path, "same")
        return value.dtype, tuple(size for index, size in enumerate(value.shape) if index != axis)
    if isinstance(value, list | tuple):
        # Of a list of samples, what is in it; it may have any length.
        items = [_structure(item, (*path, index), axes) for index, item in enumerate(value)]
        return tuple(dict.fromkeys(items))
    if isinstance(value, dict):
        return tuple((name, _structure(item, (*path, name), axes)) for name, item in sorted(value.items()))
    is_plain = isinstance(value, bool | int | float | str | torch.dtype | None)
    return repr(value) if is_plain else type(value).__name__


def num_samples_of(arguments: Mapping[str, Any], axes: Axes | None) -> int:
    """Rows along the learned axes; without them, the first size that most tensors have."""
    if axes is not None:
        for (name, *rest), axis in axes.items():
            value = arguments.get(name)
            if isinstance(axis, int) and not rest and isinstance(value, torch.Tensor):
                return value.shape[axis]
    sizes = Counter(value.shape[0] for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim)
    return sizes.most_common(1)[0][0] if sizes else 1


def compilers_errors() -> tuple[type[Exception], ...]:
    """What is raised by what could not be compiled, and not by what was computed."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def raise_if_out_of_memory(error: BaseException) -> None:
    """A compiler that tries kernels may run out of memory: a smaller batch helps."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "inner_exception", None)
        for each in (inner, seen):
            if each is not None and is_out_of_memory(each):
                raise each
        seen = seen.__cause__


def in_short(error: BaseException) -> str:
    """What the compiler itself said, in one line."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {first.strip()[:LONGEST_REASON]}"
