"""How one forward uses adapters that lie in its module's PEFT layers: those of its samples, each at its own scale.

A layer keeps what is loaded and is told nothing of requests. At rest it gives what its base layer gives. In `applied`
the base layer runs once for all samples; then PEFT's own forward adds to the rows of each request, which is what
diffusers' `set_adapters` and a forward give. A compiled block calls one operator in each layer, which does this as it
runs: what is compiled knows of no adapter, and is compiled again for new layers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

Scales = Mapping[str, float]  # by the name of the adapter in PEFT's layers, in the order in which they are added


class RowsUnknownError(Exception):
    """It cannot be told which rows of a layer's input are those of which sample; lone forwards need not know."""


@dataclass(frozen=True)
class Batch:
    """What the samples of the forward under way use."""

    runs: tuple[tuple[int, Scales], ...]  # neighbours that use the same are one; scales of 0 are left out
    num_samples: int
    is_even: bool


@dataclass(eq=False)
class Applied:
    """Shared by all layers of one module, whose forwards are made one at a time."""

    batch: Batch | None = None
    num_layers: int = 0
    configs: dict[str, Any] = field(default_factory=dict)  # of the adapters whose layers are known


_numbers = count()
_layers: WeakValueDictionary[int, LoraLayer] = WeakValueDictionary()  # by their numbers, for the operator


@contextmanager
def applied(module: torch.nn.Module, samples: Sequence[tuple[int, Scales]], is_even: bool = True) -> Iterator[None]:
    """Around one forward: of each request in its batch the number of samples, in the order of their rows, and the
    adapters that they use.

    `is_even`: whether each sample has as many rows as any other in every argument. In layers with several rows for each
    sample nobody could tell them apart otherwise.

    A forward whose samples use the same gives the bytes of `set_adapters(names, weights)`; a scale of 0 is none. The
    forward raises RowsUnknownError in a layer whose rows cannot be told apart. ValueError: the module does not hold an
    adapter.
    """
    runs = _joined([(number, {n: s for n, s in scales.items() if s}) for number, scales in samples])
    names = {name for _, scales in runs for name in scales}
    now = _knowing(module, names) if names else vars(module).get("_adapters_applied")
    if now is None:
        yield
        return
    # Around a part of a forward, which may use none where the whole one does.
    batch = Batch(runs, sum(number for number, _ in runs), is_even) if names else None
    before, now.batch = now.batch, batch
    try:
        yield
    finally:
        now.batch = before  # a component may call itself


def prepare(module: torch.nn.Module) -> None:
    """Lets the PEFT layers of a module be told by `applied`; to be called after each injection. At rest they give what
    their base layers give, whatever PEFT has active.
    """
    now = vars(module).setdefault("_adapters_applied", Applied())
    now.configs = dict(getattr(module, "peft_config", None) or {})
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and "_adapters_now" not in vars(layer):
            number = next(_numbers)
            _layers[number] = layer
            # A tensor: what is compiled takes it as an input, where a number would be a part of the code.
            vars(layer).update(_adapters_now=now, _number=torch.tensor(number), forward=MethodType(_forward, layer))
            now.num_layers += 1


def under_way(module: torch.nn.Module) -> Batch | None:
    """What the forward of the module that is now surrounded by `applied` uses; None: nothing."""
    now = vars(module).get("_adapters_applied")
    return now.batch if isinstance(now, Applied) else None


def num_layers(module: torch.nn.Module) -> int:
    """Layers with room for adapters: with more of them, what was compiled is compiled again."""
    now = vars(module).get("_adapters_applied")
    return now.num_layers if isinstance(now, Applied) else 0


def why_not(module: torch.nn.Module) -> str | None:
    """Why forwards of a module cannot use adapters: for how its weights are kept, or what PEFT has put into it."""
    for name, weight in module.named_parameters():
        if reason := _why_not_weight(weight):
            return f"{name.removesuffix('.weight')} {reason}"
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and (reason := _why_not_layer(layer)):
            return f"{name} {reason}"
    return None


def _why_not_weight(weight: torch.Tensor) -> str | None:
    """PEFT keeps an adapter in the dtype of the layer that it is for, where that is one of floating point."""
    if type(weight).__name__ == "Int4Tensor":
        return "is kept in torchao's int4, for which PEFT has no layer"
    if weight.dtype.is_floating_point and weight.dtype.itemsize < 2:
        kept = str(weight.dtype).removeprefix("torch.")
        return f"is kept in {kept} (as precision: layerwise does), in which PEFT would keep the adapter too"
    return None


def _why_not_layer(layer: BaseTunerLayer) -> str | None:
    if not isinstance(layer, LoraLayer):
        return f"is no LoRA but {type(layer).__module__.rpartition('.tuners.')[2].partition('.')[0]}"
    if isinstance(layer, MultiheadAttention | ParamWrapper):
        return f"is a {type(layer).__name__}, whose weights PEFT exchanges for a forward: for all samples of a batch"
    if layer.lora_variant:
        variants = sorted({type(variant).__name__ for variant in layer.lora_variant.values()})
        return f"is a LoRA of the kind {', '.join(variants)}"
    return None


def _joined(samples: Sequence[tuple[int, Scales]]) -> tuple[tuple[int, Scales], ...]:
    runs: list[tuple[int, Scales]] = []
    for number, scales in samples:
        if runs and list(runs[-1][1].items()) == list(scales.items()):
            number += runs.pop()[0]
        runs.append((number, scales))
    return tuple(runs)


def _knowing(module: torch.nn.Module, names: set[str]) -> Applied:
    """What its layers share, when all layers of these adapters are known."""
    configs: Mapping[str, Any] = getattr(module, "peft_config", None) or {}
    if missing := sorted(names - set(configs)):
        raise ValueError(f"{type(module).__name__} does not hold the adapters {', '.join(missing)}")
    now = vars(module).get("_adapters_applied")
    # An adapter that was taken out and put in again may have new layers, and has a new configuration.
    if not isinstance(now, Applied) or any(now.configs.get(name) is not configs[name] for name in names):
        prepare(module)
        now = vars(module)["_adapters_applied"]
    known: Applied = now
    return known


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a PEFT layer, in place of its own."""
    result: torch.Tensor = layer.base_layer(x, *args, **kwargs)
    if torch.compiler.is_compiling():
        add_adapters(result, x, layer._number)
        return result
    batch = layer._adapters_now.batch
    return result if batch is None else _added(layer, batch, x, result)


@torch.library.custom_op("triptych::add_adapters", mutates_args=("result",))
def add_adapters(result: torch.Tensor, x: torch.Tensor, number: torch.Tensor) -> None:
    """Adds what the samples of the forward under way use of the layer of that number, in place."""
    layer: Any = _layers[int(number)]
    batch = layer._adapters_now.batch
    if batch is not None:
        added = _added(layer, batch, x, result)
        if added is not result:
            result.copy_(added)


@add_adapters.register_fake
def _(result: torch.Tensor, x: torch.Tensor, number: torch.Tensor) -> None:
    return None


def _added(layer: LoraLayer, batch: Batch, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The base layer's result with what its samples use of this layer; may write into it."""
    runs = [(number, {n: s for n, s in scales.items() if n in layer.scaling}) for number, scales in batch.runs]
    first = list(runs[0][1].items())
    if all(list(scales.items()) == first for _, scales in runs):
        return _with_adapters(layer, x, result, runs[0][1]) if first else result
    rows = _rows_of_a_sample(batch, x, result)
    start = 0
    for number, scales in runs:
        stop = start + number * rows
        if scales:
            result[start:stop] = _with_adapters(layer, x[start:stop], result[start:stop], scales)
        start = stop
    return result


def _rows_of_a_sample(batch: Batch, x: torch.Tensor, result: torch.Tensor) -> int:
    rows, rest = divmod(len(result), batch.num_samples)
    if rest or result.ndim < 2 or len(x) != len(result):
        raise RowsUnknownError(f"{batch.num_samples} samples in a layer from {list(x.shape)} to {list(result.shape)}")
    if rows > 1 and not batch.is_even:
        raise RowsUnknownError(f"{batch.num_samples} samples of different lengths in {list(x.shape)}")
    return rows


def _with_adapters(layer: LoraLayer, x: torch.Tensor, result: torch.Tensor, scales: Scales) -> torch.Tensor:
    """PEFT's own forward of a layer like this one, with these adapters at these scales and this result of the base."""
    like: Any = object.__new__(type(layer))
    vars(like).update(
        vars(layer),
        base_layer=_Given(layer.get_base_layer(), result),
        scaling={name: _scaling(layer, name, scale) for name, scale in scales.items()},
        _active_adapter=list(scales),
        _disable_adapters=False,
        merged_adapters=[],
    )
    cls: Any = type(layer)
    added: torch.Tensor = cls.forward(like, x)
    return added


def _scaling(layer: LoraLayer, name: str, scale: float) -> float:
    """As `LoraLayer.set_scale` computes it, to the bit."""
    rank = layer.r[name]
    scaling: float = scale * layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
    return scaling


class _Given:
    """A base layer whose result is there already."""

    def __init__(self, layer: torch.nn.Module, result: torch.Tensor) -> None:
        self._layer = layer
        self._result = result

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
