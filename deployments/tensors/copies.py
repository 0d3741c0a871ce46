"""Copies between a device and the host beside the work of others: on streams of their own, through pinned memory.

A copy on the stream of the forwards would wait for all that is queued there, of whatever request. Where torch has no
streams for a device (the CPU, MPS), copies are made as everywhere.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 64  # bytes between the beginnings of two tensors in one staging buffer: that of any dtype
STREAM_MODULE = ("Stream", "Event", "stream", "current_stream")  # what a device's module must have

Bytes = npt.NDArray[np.uint8]
Moment = Any  # an event of the device: what was queued before it; None where there are no streams


@dataclass(frozen=True)
class Numbers:
    """A dense tensor as it lies in a message."""

    data: Bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


def queued_so_far(device: torch.device) -> Moment:
    """All that the calling thread's stream holds now; the host does not wait for it."""
    streams = _streams_of(device)
    return streams.queued_so_far() if streams is not None else None


def wait_until(moment: Moment) -> None:
    """The calling thread waits; another work on the device does not hold it up."""
    if moment is not None:
        moment.synchronize()


@contextmanager
def beside_forwards(device: torch.device, after: Moment) -> Iterator[None]:
    """What the block queues runs beside the forwards, once `after` is done.

    The caller holds the tensors that the block reads until the host has waited for what it queues.
    """
    streams = _streams_of(device)
    if streams is None:
        yield
        return
    with streams.outward(after):
        yield


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous copies in memory of the CPU that nobody else has, complete when this returns."""
    copies: dict[int, torch.Tensor] = {}
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_device[tensor.device].append(index)
    for device, indices in by_device.items():
        given = [tensors[index].detach() for index in indices]
        streams = _streams_of(device)
        made = streams.to_host(given) if streams is not None else [_plain_copy(each) for each in given]
        copies.update(zip(indices, made, strict=True))
    return [copies[index] for index in range(len(tensors))]


def to_device(sources: Sequence[Numbers], device: torch.device) -> list[torch.Tensor]:
    """The tensors in memory of their own on the device, complete when this returns."""
    streams = _streams_of(device)
    if streams is not None and sources:
        return streams.to_device(sources)
    # A buffer from the object store is memory shared with other readers: copy before anything is written.
    return [_staged(each, torch.empty(each.data.nbytes, dtype=torch.uint8)).to(device) for each in sources]


def pinned(num_bytes: int) -> torch.Tensor:
    """Memory of the host that the device copies from and to by itself; torch keeps it for the next copies."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class _Streams:
    """The two streams of a device on which nothing but copies runs, one for each direction."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._outward, self._inward = module.Stream(device=device), module.Stream(device=device)

    def queued_so_far(self) -> Moment:
        event = self._event()
        event.record(self._module.current_stream(self._device))
        return event

    @contextmanager
    def outward(self, after: Moment) -> Iterator[None]:
        if after is not None:
            self._outward.wait_event(after)
        with self._module.stream(self._outward):
            yield

    def to_host(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        places, num_bytes = _places([each.numel() * each.element_size() for each in tensors])
        staging = pinned(num_bytes)
        copies = [
            staging[place : place + each.numel() * each.element_size()].view(each.dtype).view(each.shape)
            for place, each in zip(places, tensors, strict=True)
        ]
        with self.outward(self.queued_so_far()):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            done = self._event()
            done.record(self._outward)
        done.synchronize()
        return copies

    def to_device(self, sources: Sequence[Numbers]) -> list[torch.Tensor]:
        places, num_bytes = _places([each.data.nbytes for each in sources])
        staging = pinned(num_bytes)
        staged = [
            _staged(each, staging[place : place + each.data.nbytes])
            for place, each in zip(places, sources, strict=True)
        ]
        reader = self._module.current_stream(self._device)
        with self._module.stream(self._inward):
            made = [each.to(self._device, non_blocking=True) for each in staged]
            done = self._event()
            done.record(self._inward)
        done.synchronize()  # of these copies alone; the staging buffer is free again
        for tensor in made:
            tensor.record_stream(reader)  # its memory is that of the inward stream, which must not give it to others
        return made

    def _event(self) -> Any:
        # A thread that waits for an event of CUDA turns round in a loop unless it is told to sleep.
        return self._module.Event(blocking=True) if self._device.type == "cuda" else self._module.Event()


_streams: dict[tuple[str, int], _Streams] = {}
_making = threading.Lock()


def _streams_of(device: torch.device) -> _Streams | None:
    """Made once: the allocator keeps memory for each stream apart. None for a device without streams."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    if not all(hasattr(module, name) for name in STREAM_MODULE):
        return None
    key = device.type, device.index or 0
    with _making:
        if key not in _streams:
            _streams[key] = _Streams(module, device)
        return _streams[key]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of them begins in one buffer, and how long that is."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return places, end


def _staged(source: Numbers, memory: torch.Tensor) -> torch.Tensor:
    """The numbers in the given memory of the CPU."""
    if not source.data.nbytes:
        return torch.empty(source.shape, dtype=source.dtype)
    memory.numpy()[:] = source.data
    return memory.view(source.dtype).view(source.shape)


def _plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
