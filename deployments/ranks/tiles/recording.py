"""Records the calls that an autoencoder makes of its coder, without making them.

The autoencoder's own code runs, whatever it does; what its coder would return has shapes and no numbers (the meta
device), and so has all that is computed from it. Which calls depend on which shows in what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.ranks.tiles.calls import Call, Chain, Taken
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import PLAIN, leaves, map_values, parts, shape_key, tensors

META = torch.device("meta")
SENT: tuple[type, ...] = (*PLAIN, torch.Tensor, torch.dtype, torch.Size, slice)
TWINS_KEPT = 256  # kinds of calls whose shapes are remembered
# Marked as drawing numbers for the sake of dropout, which no autoencoder has when it serves.
ATTENTION = ("scaled_dot_product", "fused_sdp")


class NotSpreadError(Exception):
    """The calls cannot be made apart from each other; says why."""


@dataclass(frozen=True)
class Recording:
    """The calls of a coder, in chains of those that take from each other."""

    chains: tuple[Chain, ...]
    order: tuple[tuple[int, int], ...]  # of each call as the autoencoder makes it: chain, index in the chain
    outputs: tuple[Any, ...]  # of each call, with tensors without numbers


class Coder:
    """A decoder or an encoder, and its twin on the meta device."""

    def __init__(self, module: torch.nn.Module, twin: Callable[[], torch.nn.Module]) -> None:
        self.module, self._make_twin = module, twin
        self._at_first = [(part, _attributes(part)) for part in module.modules()]
        self._effects: dict[str, Effect] = {}

    @cached_property
    def twin(self) -> torch.nn.Module:
        """Made once, while nothing is recorded."""
        return self._make_twin()

    def check_unchanged(self) -> None:
        """Raises NotSpreadError where its parts were set otherwise since, by the autoencoder's own code."""
        _check_unchanged(self._at_first)

    def effect(self, args: Any, kwargs: Any) -> Effect:
        """Found out once for each kind of call. Raises NotSpreadError, and what the twin raises."""
        key = shape_key((args, kwargs))
        if key not in self._effects:
            if len(self._effects) >= TWINS_KEPT:
                self._effects.clear()
            self._effects[key] = self._seen(args, kwargs)
        return self._effects[key]

    def _seen(self, args: Any, kwargs: Any) -> Effect:
        twin = self.twin
        before = [(part, _attributes(part)) for part in twin.modules()]
        versions = [buffer._version for buffer in twin.buffers()]
        given = map_values(
            lambda leaf: _without_numbers(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
        places = {id(leaf): place for place, leaf in enumerate(leaves(given)) if isinstance(leaf, torch.Tensor)}
        kept = list(leaves(given))  # so that no other tensor gets the id of one
        with torch.device(META):
            output = twin(*given[0], **given[1])
        _check_unchanged(before)
        if versions != [buffer._version for buffer in twin.buffers()]:
            raise NotSpreadError("it writes into its buffers")

        def leaf(value: Any) -> Any:
            return Same(places[id(value)]) if isinstance(value, torch.Tensor) and id(value) in places else value

        effect = Effect(map_values(leaf, output), map_values(leaf, given))
        del kept
        return effect


@dataclass(frozen=True)
class Same:
    """Stands for what the call was given."""

    place: int  # among the leaves of (args, kwargs)


@dataclass(frozen=True)
class Effect:
    """What a call returns, and what it leaves of what it was given: trees with tensors without numbers, and Same."""

    output: Any
    given: Any

    def on(self, args: Any, kwargs: Any) -> Any:
        """Leaves its marks in the caller's own lists and dictionaries, and returns the output."""
        given = list(leaves((args, kwargs)))
        fresh: dict[int, torch.Tensor] = {}

        def leaf(value: Any) -> Any:
            if isinstance(value, Same):
                return given[value.place]
            if isinstance(value, torch.Tensor):
                return fresh.setdefault(id(value), torch.empty_like(value))
            return value

        _write((args, kwargs), map_values(leaf, self.given))
        return map_values(leaf, self.output)


def _write(container: Any, after: Any) -> Any:
    """What is left of the container: itself, where it is one that can be written into."""
    if isinstance(container, list) and isinstance(after, list):
        container[:] = [_write(container[n] if n < len(container) else None, each) for n, each in enumerate(after)]
        return container
    if isinstance(container, dict) and isinstance(after, dict):
        left = {name: _write(container.get(name), each) for name, each in after.items()}
        container.clear()
        container.update(left)
        return container
    if isinstance(container, tuple) and type(after) is tuple and len(container) == len(after):
        return tuple(_write(before, each) for before, each in zip(container, after, strict=True))
    return after


@torch.no_grad()
def record(autoencoder: torch.nn.Module, name: str, coder: Coder, work: Callable[[], Any]) -> Recording:
    """The calls of its part of that name that `work` makes of it.

    The numbers that the calls are given are computed. Raises NotSpreadError where the calls cannot be told apart.
    """
    assert coder.twin is not None  # it is made before the code is watched
    seen = _Seen()
    recorder = _Recorder(coder, seen)
    try:
        with standing_in(autoencoder, name, StandIn(coder.module, recorder.record)), seen:
            returned = work()
    except NotSpreadError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NotSpreadError(f"its code needs one call's numbers before the others: {error}") from error
    coder.check_unchanged()
    seen.note(returned)
    return recorder.recording()


@contextmanager
def standing_in(autoencoder: torch.nn.Module, name: str, stand_in: Any) -> Iterator[None]:
    """The autoencoder with this in place of its part; afterwards with the attributes that it had, and in its lists and
    dictionaries what was in them."""
    attributes = dict(vars(autoencoder))
    contents = [(value, value.copy()) for value in attributes.values() if type(value) in (list, dict)]
    vars(autoencoder)[name] = stand_in
    try:
        yield
    finally:
        for value, before in contents:
            value.clear()
            value.update(before) if isinstance(value, dict) else value.extend(before)
        vars(autoencoder).clear()
        vars(autoencoder).update(attributes)


class StandIn:
    """Called in a coder's place; all else is the coder's own."""

    def __init__(self, module: torch.nn.Module, call: Callable[..., Any]) -> None:
        vars(self).update(_module=module, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class _Recorder:
    """What is called in a coder's place."""

    def __init__(self, coder: Coder, seen: _Seen) -> None:
        self._coder, self._seen = coder, seen
        self._calls: list[Call] = []
        self._outputs: list[Any] = []
        self._chain: list[int] = []  # of each call: the first call of its chain
        self._sources: dict[int, tuple[int, int]] = {}  # by the id of a tensor without numbers: call, leaf
        self._kept: list[Any] = []

    def record(self, *args: Any, **kwargs: Any) -> Any:
        self._coder.check_unchanged()
        index = len(self._calls)
        taken: list[Taken] = []

        def leaf(place: int, value: Any) -> Any:
            if not isinstance(value, SENT):
                raise NotSpreadError(f"it is given a {type(value).__name__}, which cannot be sent to other ranks")
            if not isinstance(value, torch.Tensor):
                return value
            if not self._seen.has_no_numbers(value):
                return value.detach().clone()  # whatever becomes of it until the call is made
            if id(value) not in self._sources:
                raise NotSpreadError("what one call is given is computed from what another returns")
            taken.append(Taken(place, *self._sources[id(value)]))
            return None

        given_args, given_kwargs = _numbered(leaf, (args, kwargs))
        call = Call(given_args, given_kwargs, tuple(taken))
        with self._seen.inside():
            output = self._coder.effect(args, kwargs).on(args, kwargs)
        for number, value in enumerate(leaves((output, args, kwargs))):
            if isinstance(value, torch.Tensor) and value.is_meta:
                self._sources[id(value)] = index, number
                self._kept.append(value)
        self._calls.append(call)
        self._outputs.append(output)
        self._join(index, {each.call for each in taken})
        return output

    def _join(self, index: int, earlier: set[int]) -> None:
        self._chain.append(index)
        chains = {self._chain[call] for call in earlier} | {index}
        first = min(chains)
        self._chain = [first if chain in chains else chain for chain in self._chain]

    def recording(self) -> Recording:
        members: dict[int, list[int]] = {}
        for index, first in enumerate(self._chain):
            members.setdefault(first, []).append(index)
        place = {index: (n, k) for n, chain in enumerate(members.values()) for k, index in enumerate(chain)}

        def call(index: int) -> Call:
            recorded = self._calls[index]
            taken = tuple(replace(each, call=place[each.call][1]) for each in recorded.taken)
            return replace(recorded, taken=taken, wanted=self._seen.wanted(self._outputs[index]))

        chains = tuple(tuple(map(call, chain)) for chain in members.values())
        return Recording(chains, tuple(place[index] for index in range(len(self._calls))), tuple(self._outputs))


class _Seen(TorchDispatchMode):
    """Lets numbers meet what has none, and notes which tensors without numbers are used. Raises NotSpreadError where
    random numbers are drawn: their order would be another one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._used: set[int] = set()
        self._written: dict[int, Any] = {}  # memory into which something without numbers was written
        self._is_inside = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Meanwhile the twin of the coder computes."""
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def has_no_numbers(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta or tensor.untyped_storage()._cdata in self._written

    def note(self, value: Any) -> None:
        self._used.update(id(tensor) for tensor in tensors(value))

    def wanted(self, output: Any) -> tuple[int, ...]:
        """The leaves of a coder's output whose numbers are used."""
        return tuple(
            n
            for n, leaf in enumerate(leaves(output))
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and id(leaf) in self._used
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if torch.Tag.nondeterministic_seeded in func.tags and not any(each in name for each in ATTENTION):
            raise NotSpreadError("it draws random numbers")
        if self._is_inside:
            return func(*args, **kwargs)
        without = [tensor for tensor in tensors((args, kwargs)) if self.has_no_numbers(tensor)]
        if not without:
            return func(*args, **kwargs)
        self._used.update(id(tensor) for tensor in without)
        for storage in (tensor.untyped_storage() for tensor in _written_by(func, args, kwargs) if not tensor.is_meta):
            self._written[storage._cdata] = storage
        args, kwargs = map_values(_meta_like, (args, kwargs))
        return func(*args, **kwargs)


def _written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What an operation writes into, of what it is given."""
    names = [
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return tensors([given.get(name) for name in names])


def _meta_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return _without_numbers(value)
    return META if isinstance(value, torch.device) else value


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _numbered(function: Callable[[int, Any], Any], value: Any) -> Any:
    """`map_values` with the place of each leaf."""
    places = iter(range(2**62))
    return map_values(lambda leaf: function(next(places), leaf), value)


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """As they are now: of its tables, lists and dictionaries a copy. Without what it computes anew in each call."""
    computed = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    return {
        name: value.copy() if type(value) in (dict, list) else value
        for name, value in vars(module).items()
        if name not in computed
    }


def _check_unchanged(before: list[tuple[torch.nn.Module, dict[str, Any]]]) -> None:
    """Raises NotSpreadError."""
    for part, attributes in before:
        if not _is_unchanged(part, attributes):
            raise NotSpreadError(f"a {type(part).__name__} in it keeps something from call to call")


def _is_unchanged(part: torch.nn.Module, before: dict[str, Any]) -> bool:
    """Tensors count by their identity; quickly for what is untouched, since it is asked at each call."""
    try:
        if vars(part) == before:
            return True
    except (RuntimeError, ValueError, TypeError):  # tensors say of each number whether it is equal
        pass
    now = _attributes(part)
    return now.keys() == before.keys() and all(_is_same(value, before[name]) for name, value in now.items())


def _is_same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, torch.Tensor) or isinstance(before, torch.Tensor) or type(now) is not type(before):
        return False
    opened, former = parts(now), parts(before)
    if opened is None or former is None:
        return isinstance(now, PLAIN) and bool(now == before)
    if len(opened[0]) != len(former[0]) or (isinstance(now, dict) and list(now) != list(before)):
        return False
    return all(_is_same(one, other) for one, other in zip(opened[0], former[0], strict=True))
