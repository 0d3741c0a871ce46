"""Values of pipelines to and from `Packed`: JSON for the structure, flat bytes for the numbers.

Only classes of diffusers and transformers that are outputs, mappings or distributions are rebuilt by
name, so a packed message can name no other code. Strides of dense tensors are kept, because kernels
choose their algorithm by them and a different algorithm gives different bits.
"""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from deployments.messages import JSON, Packed
from deployments.tensors.copies import Bytes, Numbers, to_device, to_host
from deployments.tensors.values import (
    LIBRARIES,
    PLAIN,
    MissingTensor,
    Opaque,
    is_output,
    is_record,
    is_record_class,
    output_fields,
    parts,
    rebuilt_output,
)

Buffers = list[torch.Tensor | Bytes]  # the tensors are copied later, all together
EMPTY: Bytes = np.empty(0, np.uint8)


@dataclass(frozen=True)
class OnStageDevice:
    """A value whose tensors are said to be on the sender's device; made by `made_on`."""

    value: Any


def made_on(device: torch.device, value: Any) -> Any:
    """What a component takes or gives, for `pack` by a stage on `device`.

    It belongs on the device of whoever unpacks it. Where the sender has no other device than the CPU, where a tensor
    lies does not tell it from what the pipeline keeps on the host (random states, a schedule).
    """
    return OnStageDevice(value) if device.type == "cpu" else value


def pack(value: Any) -> Packed:
    """A copy: what becomes of the value later, in whatever container it lies, changes nothing in the message.

    Raises TypeError for an object that no message may carry.
    """
    buffers: Buffers = []
    tree = _pack(value, buffers, {})
    # The loop that made a tensor goes on with it, perhaps in place, so that memory of the CPU is copied too.
    copies = iter(to_host([each for each in buffers if isinstance(each, torch.Tensor)]))
    return Packed(tree, tuple(_bytes_of(next(copies)) if isinstance(each, torch.Tensor) else each for each in buffers))


def taken_apart(value: Any) -> tuple[JSON, Buffers]:
    """The structure of the value, and its buffers where they are: tensors are dense, none is copied. `put_together`
    makes the value of both.

    Raises TypeError for an object that no message may carry.
    """
    buffers: Buffers = []
    return _pack(value, buffers, {}), buffers


def put_together(tree: JSON, buffers: list[torch.Tensor]) -> Any:
    """The value of `taken_apart`; `buffers` are flat bytes, in whose memory the value's tensors lie."""
    tensors: dict[int, torch.Tensor] = {}
    for node in _tensor_nodes(tree):
        dense = buffers[node["buffer"]].view(getattr(torch, node["dtype"])).view(node["shape"])
        tensors[node["buffer"]] = dense.permute([node["order"].index(side) for side in range(dense.ndim)])
    plain: dict[int, Bytes] = {index: each.numpy() for index, each in enumerate(buffers) if index not in tensors}
    return _unpack(tree, tuple(plain.get(index, EMPTY) for index in range(len(buffers))), tensors)


def can_pack(value: Any) -> bool:
    """Whether `pack` takes the value; no tensor is copied."""
    try:
        _pack(value, [], {})
    except TypeError:
        return False
    return True


def tensor_bytes(value: Any) -> int:
    """Bytes that the tensors of the value will take in a message; none is copied. Raises TypeError as `pack`."""
    buffers: Buffers = []
    _pack(value, buffers, {})
    return sum(each.numel() * each.element_size() for each in buffers if isinstance(each, torch.Tensor))


def unpack(packed: Packed, device: torch.device) -> Any:
    """The value, its tensors in memory of their own: those of the sender's accelerator on `device`.

    A tensor that was at two places of the sender's value is at both here.
    """
    nodes = {node["buffer"]: node for node in _tensor_nodes(packed.tree)}
    tensors: dict[int, torch.Tensor] = {}
    for is_on_device, where in ((True, device), (False, torch.device("cpu"))):
        chosen = {index: node for index, node in nodes.items() if node["on_stage_device"] == is_on_device}
        sources = [
            Numbers(packed.buffers[index], getattr(torch, node["dtype"]), tuple(node["shape"]))
            for index, node in chosen.items()
        ]
        for (index, node), tensor in zip(chosen.items(), to_device(sources, where), strict=True):
            tensors[index] = tensor.permute([node["order"].index(side) for side in range(tensor.ndim)])
    return _unpack(packed.tree, packed.buffers, tensors)


def _pack(value: Any, buffers: Buffers, known: dict[int, JSON]) -> Any:
    if isinstance(value, PLAIN) and not isinstance(value, bytes):
        return value
    if isinstance(value, OnStageDevice):
        node = _pack(value.value, buffers, known)
        _count_as_on_device(node)
        return node
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            known[id(value)] = _pack_tensor(value, buffers)
        return known[id(value)]
    for kind, (cls, write, _) in PLAIN_OBJECTS.items():
        if isinstance(value, cls):
            return {"kind": kind, "value": write(value)}
    for kind, (cls, write, _) in BUFFER_OBJECTS.items():
        if isinstance(value, cls):
            header, data = write(value)
            buffers.append(data)
            return {"kind": kind, "value": header, "buffer": len(buffers) - 1}
    opened = parts(value)
    if opened is None:
        raise TypeError(f"a {type(value).__module__}.{type(value).__name__} cannot cross a replica boundary")
    items: list[JSON] = [_pack(child, buffers, known) for child in opened[0]]
    if isinstance(value, list):
        return items
    if type(value) is tuple:
        return {"kind": "tuple", "items": items}
    names: list[JSON] = list(_names_of(value))
    if isinstance(value, dict) and not is_output(value):
        return {"kind": "dict", "names": names, "items": items}
    return {"kind": "library", "class": _class_path(type(value)), "names": names, "items": items}


def _count_as_on_device(tree: JSON) -> None:
    for node in _nodes(tree):
        if node["kind"] == "tensor":
            node["on_stage_device"] = True
        elif node["kind"] == "missing":
            node["value"][2] = True


def _names_of(value: Any) -> list[str]:
    """Those of the children that `parts` gives; none of a named tuple's."""
    if is_output(value):
        return output_fields(value)
    return list(vars(value)) if is_record(value) else list(getattr(value, "keys", list)())


def _tensor_nodes(tree: JSON) -> Iterator[dict[str, Any]]:
    return (node for node in _nodes(tree) if node["kind"] == "tensor")


def _nodes(tree: JSON) -> Iterator[dict[str, Any]]:
    if isinstance(tree, list):
        for item in tree:
            yield from _nodes(item)
    elif isinstance(tree, dict):
        node: dict[str, Any] = tree
        yield node
        yield from _nodes(node.get("items"))


def _unpack(tree: JSON, buffers: tuple[Bytes, ...], tensors: dict[int, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, buffers, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    node: dict[str, Any] = tree
    kind = node["kind"]
    if kind == "tensor":
        return tensors[node["buffer"]]
    if kind in PLAIN_OBJECTS:
        return PLAIN_OBJECTS[kind][2](node["value"])
    if kind in BUFFER_OBJECTS:
        return BUFFER_OBJECTS[kind][2](node["value"], buffers[node["buffer"]])
    children = [_unpack(item, buffers, tensors) for item in node["items"]]
    if kind == "tuple":
        return tuple(children)
    if kind == "dict":
        return dict(zip(node["names"], children, strict=True))
    return _rebuild(_library_class(node["class"]), dict(zip(node["names"], children, strict=True)), children)


def _rebuild(cls: type, fields: dict[str, Any], children: list[Any]) -> Any:
    if hasattr(cls, "_fields"):
        return cls(*children)
    if issubclass(cls, UserDict):
        return cls(fields)
    if hasattr(cls, "to_tuple"):
        return rebuilt_output(cls, fields)
    record = object.__new__(cls)
    record.__dict__.update(fields)
    return record


def _class_path(cls: type) -> str:
    path = f"{cls.__module__}:{cls.__qualname__}"
    if not path.startswith(LIBRARIES):
        raise TypeError(f"a {path} cannot cross a replica boundary")
    return path


def _library_class(path: str) -> type:
    module, _, name = path.partition(":")
    cls = getattr(importlib.import_module(module), name) if path.startswith(LIBRARIES) else None
    allowed = isinstance(cls, type) and (
        hasattr(cls, "to_tuple") or hasattr(cls, "_fields") or issubclass(cls, UserDict) or is_record_class(cls)
    )
    if not allowed:
        raise TypeError(f"a message names the class {path}, which no message may carry")
    assert isinstance(cls, type)
    return cls


def _pack_tensor(tensor: torch.Tensor, buffers: Buffers) -> JSON:
    if tensor.device.type == "meta":
        raise TypeError("a tensor without numbers (device meta) cannot cross a replica boundary")
    order = _storage_order(tensor)
    dense = tensor.detach().permute(order)
    buffers.append(dense)
    return {
        "kind": "tensor",
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(dense.shape),
        "order": list(order),
        "on_stage_device": tensor.device.type != "cpu",
        "buffer": len(buffers) - 1,
    }


def _bytes_of(dense: torch.Tensor) -> Bytes:
    flat = dense.as_strided((dense.numel(),), (1,))  # reshape leaves a single number whatever stride it has
    data: Bytes = flat.view(torch.uint8).numpy() if dense.numel() else np.empty(0, np.uint8)
    return data


def _storage_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost in memory."""
    if tensor.is_contiguous() or not tensor.numel():
        return list(range(tensor.ndim))
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_generator(_: Any, state: Bytes) -> torch.Generator:
    return torch.Generator("cpu").set_state(torch.from_numpy(state.copy()))


def _array(value: npt.NDArray[Any] | np.generic) -> tuple[JSON, Bytes]:
    array = np.array(value, order="C", copy=True)
    if array.dtype.hasobject:
        raise TypeError("an array of Python objects cannot cross a replica boundary")
    return {"dtype": array.dtype.str, "shape": list(np.shape(value))}, array.reshape(-1).view(np.uint8)


def _read_array(header: Any, data: Bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = data.copy().view(np.dtype(header["dtype"]))
    return array.reshape(header["shape"])


# kind -> (class, to JSON, from JSON)
PLAIN_OBJECTS: dict[str, tuple[Any, Any, Any]] = {
    "dtype": (torch.dtype, _dtype_name, lambda v: getattr(torch, v)),
    "device": (torch.device, lambda v: v.type, torch.device),
    "size": (torch.Size, list, torch.Size),
    "slice": (slice, lambda v: [v.start, v.stop, v.step], lambda v: slice(*v)),
    "missing": (
        MissingTensor,
        lambda v: [list(v.shape), _dtype_name(v.dtype), v.on_stage_device],
        lambda v: MissingTensor(tuple(v[0]), getattr(torch, v[1]), v[2]),
    ),
    "opaque": (Opaque, lambda v: v.type_name, Opaque),
}
# kind -> (class, to (JSON, bytes), from (JSON, bytes))
BUFFER_OBJECTS: dict[str, tuple[Any, Any, Any]] = {
    "bytes": (bytes, lambda v: (None, np.frombuffer(v, np.uint8)), lambda _, data: data.tobytes()),
    "array": ((np.ndarray, np.generic), _array, _read_array),
    "image": (
        Image.Image,
        lambda v: ([v.mode, *v.size], np.frombuffer(v.tobytes(), np.uint8)),
        lambda h, data: Image.frombytes(h[0], (h[1], h[2]), data.tobytes()),
    ),
    "generator": (torch.Generator, lambda v: (None, v.get_state().numpy()), _read_generator),
}
