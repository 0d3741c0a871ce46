"""An autoencoder whose `decode` and `encode` are made whole where they fit into memory, else in slices and tiles."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from deployments.memory.activations import peak_bytes, tensors_of
from deployments.memory.args import VAEArgs
from deployments.memory.stage_memory import StageMemory
from deployments.memory.switches import Abilities, Way, abilities_of, copy_settings, set_tile, switched
from deployments.modules import AccelerationError
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import leaves, shape_key, to_meta

logger = logging.getLogger(__name__)

METHODS = ("encode", "decode")
# What allocators round up, and what cuDNN takes to compute: neither is counted on the meta device.
MARGIN = 1.25
KEPT = 256  # shapes whose needs are remembered
TRIES_BY_TILES = 20  # calls of a shape that did not fit, before it is tried whole again
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Twin = Callable[[], Any]


def refuse_switches(classes: dict[str, type], args: VAEArgs) -> None:
    """Raises AccelerationError where `on` asks for what none of a pipeline's autoencoders can."""
    for setting in ("tiling", "slicing"):
        if getattr(args, setting) == "on" and not any(getattr(abilities_of(cls), setting) for cls in classes.values()):
            named = ", ".join(f"{cls.__name__} ({name})" for name, cls in classes.items()) or "a pipeline without any"
            raise AccelerationError(f"vae: {setting} is on, and {named} has no {setting}: auto and off are allowed")


def prepare(name: str, module: Any, twin: Twin, args: VAEArgs, memory: StageMemory) -> str:
    """Puts the settings into one autoencoder; the line for the log. Raises AccelerationError.

    `twin` makes the same autoencoder on the meta device.
    """
    if args.memory_format == "channels_last":
        to_channels_last(module)
    if tile_of(module, args):
        set_tile(name, module, args.tile)
    set_switches(module, args)
    bound = FittingAutoencoder(name, module, twin, args, memory)
    cls = type(module)
    members = {n: _fitted(n, getattr(cls, n), bound) for n in METHODS if callable(getattr(cls, n, None))}
    module.__class__ = type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
    return f"{name}: tiling {args.tiling}, slicing {args.slicing}, {args.memory_format}{bound.lacks()}"


def set_switches(module: Any, args: VAEArgs) -> None:
    """Those that are the same for all calls."""
    can = abilities_of(type(module))
    if can.slicing and args.slicing != "auto":
        module.use_slicing = args.slicing == "on"
    if can.tiling and args.tiling != "auto":
        module.use_tiling = args.tiling == "on"
    if can.chunks and args.tiling == "on":
        module.use_framewise_decoding = True


def tile_of(module: Any, args: VAEArgs) -> bool:
    """Whether sizes were given that are this one's: a pipeline's others, such as of sound, may have no tiles."""
    return bool(args.tile) and abilities_of(type(module)).tiling


def _fitted(name: str, method: Any, bound: FittingAutoencoder) -> Any:
    @functools.wraps(method)
    def fitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not bound.module:
            return method(self, *args, **kwargs)
        return bound.call(name, method, args, kwargs)

    return fitted


@dataclass(frozen=True)
class Need:
    """Bytes that a call takes besides the weights, as counted; None: it cannot be counted."""

    bytes: int | None


class FittingAutoencoder:
    """Decides for each call of one autoencoder how it is made. Called while no other code of pipelines runs."""

    def __init__(self, name: str, module: Any, twin: Twin, args: VAEArgs, memory: StageMemory) -> None:
        self.name = name
        self.module = module
        self.abilities: Abilities = abilities_of(type(module))
        self._make_twin = twin
        self._twin: Any = None
        self._knows_only_tiles = False  # Allegro's own
        self._args = args
        self._memory = memory
        self._needs: OrderedDict[Any, Need] = OrderedDict()
        self._too_large: OrderedDict[Any, int] = OrderedDict()  # shapes that did not fit whole: calls left by tiles

    def call(self, name: str, method: Any, args: Any, kwargs: Any) -> Any:
        """The output of the method of that name. Raises what it raises, the lack of memory too."""
        key = (name, shape_key((args, kwargs)))
        ways = list(self.ways(batch_of((args, kwargs))))
        way, least = self._fitting(ways, key, name, args, kwargs), ways[-1]
        try:
            with switched(self.module, way):
                return method(self.module, *args, **kwargs)
        except NotImplementedError:
            if way == least:
                raise
            self._knows_only_tiles = True
        except Exception as error:
            is_short = is_out_of_memory(error)
            if is_short:
                self._note_too_large(least, key, name, args, kwargs)
            if not is_short or way == least or self._memory.is_tried_again or self._memory.is_steady:
                raise
        # Here, where nothing holds the tensors of the failed call any more.
        self._memory.free()
        with switched(self.module, least):
            return method(self.module, *args, **kwargs)

    def _fitting(self, ways: list[Way], key: Any, method: str, args: Any, kwargs: Any) -> Way:
        """The first way that fits; where none does, or memory was lacking just now, the last."""
        if len(ways) == 1 or self._knows_only_tiles:
            return ways[-1]
        if self._memory.is_short or self._is_too_large(key):
            return ways[-1]
        available = self._memory.available()
        if available is None:
            return ways[0]
        for way in ways[:-1]:
            need = self.need(key, way, method, args, kwargs).bytes
            if need is None or need * MARGIN <= available:
                return way
        logger.info("%s.%s is made %s: %.1f GB are free", self.name, method, ways[-1], available / 1e9)
        return ways[-1]

    def ways(self, batch: int) -> Iterator[Way]:
        """From the fastest to the one that needs the least memory. `batch`: pictures in the call; 0: not to be told."""
        can, args = self.abilities, self._args
        way = Way(slicing=False if can.slicing and not batch else None)
        yield way
        if args.slicing == "auto" and can.slicing and batch > 1:
            yield (way := replace(way, slicing=True))
        if args.tiling == "auto":
            if can.chunks and not getattr(self.module, "use_framewise_decoding", True):
                yield (way := replace(way, chunks=True))
            if can.tiling and not getattr(self.module, "use_tiling", True):
                yield replace(way, tiling=True)

    def need(self, key: Any, way: Way, method: str, args: Any, kwargs: Any) -> Need:
        """Counted once for each shape."""
        if (key, way) not in self._needs:
            self._needs[key, way] = self._counted(way, method, args, kwargs)
            if len(self._needs) > KEPT:
                self._needs.popitem(last=False)
        return self._needs[key, way]

    def _counted(self, way: Way, method: str, args: Any, kwargs: Any) -> Need:
        if self._twin is None:
            self._twin = self._make_twin()
        copy_settings(self.module, self._twin)
        if (dtype := dtype_of(self.module)) != dtype_of(self._twin):  # SDXL's is cast for its decoding
            self._twin.to(dtype)
        given, named = to_meta(args), to_meta(kwargs)
        held = [*tensors_of(self._twin), *(leaf for leaf in leaves((given, named)) if isinstance(leaf, torch.Tensor))]
        try:
            with switched(self._twin, way):
                return Need(peak_bytes(lambda: getattr(self._twin, method)(*given, **named), held))
        except Exception as error:  # noqa: BLE001  (whatever its code does without numbers: it is tried instead)
            logger.info("the memory of %s.%s cannot be counted: %s", self.name, method, error)
            return Need(None)

    def _is_too_large(self, key: Any) -> bool:
        left = self._too_large.pop(key, 0)
        if left > 1:
            self._too_large[key] = left - 1
        return left > 0

    def _note_too_large(self, least: Way, key: Any, method: str, args: Any, kwargs: Any) -> None:
        given = to_meta((args, kwargs))  # so that nothing holds the tensors
        self._memory.note_need(lambda: self.need(key, least, method, *given).bytes)
        self._too_large[key] = TRIES_BY_TILES
        if len(self._too_large) > KEPT:
            self._too_large.popitem(last=False)

    def lacks(self) -> str:
        lacking = [name for name in ("tiling", "slicing") if not getattr(self.abilities, name)]
        return f" ({type(self.module).__name__} has no {' and no '.join(lacking)})" if lacking else ""


def batch_of(call: Any) -> int:
    """Pictures in a call that has one tensor; 0 with more of them, of which autoencoders slice only the first."""
    tensors = [leaf for leaf in leaves(call) if isinstance(leaf, torch.Tensor)]
    return tensors[0].shape[0] if len(tensors) == 1 and tensors[0].dim() else 0


def dtype_of(module: torch.nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def to_channels_last(module: torch.nn.Module) -> None:
    """The weights of its convolutions; what they compute takes their order of memory."""
    for weight in _weights_of_convolutions(module.modules()):
        weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.dim()])


def _weights_of_convolutions(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        weight = getattr(module, "weight", None)
        is_convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
        if is_convolution and isinstance(weight, torch.Tensor) and weight.dim() in CHANNELS_LAST:
            yield weight
