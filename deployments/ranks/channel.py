"""Values from rank to rank: JSON for the structure, then the numbers as flat bytes by torch.distributed.

No pickle: a message can name no code but the output classes that `deployments.tensors.packing` knows. A message is a
header of three lengths, the JSON, the numbers of the host and those of the device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deployments.tensors.packing import put_together, taken_apart

ALIGNMENT = 16  # bytes: a tensor of any dtype may begin there


class Channel:
    """One rank's end, for one thread. A rank that has nothing to do waits for a header without a bound: what it waits
    in is the group `control`. All else goes by the default group, whose waits are bounded."""

    def __init__(self, control: Any, device: torch.device) -> None:
        self._control, self._device = control, device

    def ask(self, message: Message, to: int) -> None:
        """Called by rank 0; raises RuntimeError where the rank is gone."""
        self._send(message, to, self._control)

    def asked(self) -> Any:
        """What rank 0 has sent, whenever it does; raises RuntimeError where it is gone."""
        return self._received(0, self._control)

    def answer(self, message: Message) -> None:
        """To rank 0; raises RuntimeError where it is gone."""
        self._send(message, 0, None)

    def answer_of(self, rank: int) -> Any:
        """Raises RuntimeError where the rank is gone, or does not answer in time."""
        return self._received(rank, None)

    def _send(self, message: Message, to: int, group: Any) -> None:
        dist.send(message.header, to, group=group)
        for part in message.parts:
            if part.numel():
                dist.send(part, to)

    def _received(self, source: int, group: Any) -> Any:
        header = torch.empty(3, dtype=torch.int64)
        dist.recv(header, source, group=group)
        host = torch.device("cpu")
        flat = [
            torch.empty(n, dtype=torch.uint8, device=d)
            for n, d in zip(header.tolist(), (host, host, self._device), strict=True)
        ]
        for part in flat:
            if part.numel():
                dist.recv(part, source)
        text, on_host, on_device = flat
        return _value_of(json.loads(text.numpy().tobytes()), on_host, on_device)


class Message:
    """A value that is ready to be sent, to any number of ranks."""

    def __init__(self, text: bytes, host: torch.Tensor, device: torch.Tensor) -> None:
        self.header = torch.tensor([len(text), host.numel(), device.numel()])
        self.parts = [torch.frombuffer(bytearray(text), dtype=torch.uint8), host, device]


def message_of(value: Any) -> Message:
    """A tensor is sent as dense memory in the order of its strides. Raises TypeError for what no message may carry."""
    tree, buffers = taken_apart(value)
    flat = [_flat(each) for each in buffers]
    places = [each.device.type != "cpu" for each in flat]
    body = {"tree": tree, "buffers": [[on_device, each.numel()] for on_device, each in zip(places, flat, strict=True)]}
    host = _joined([each for each, on_device in zip(flat, places, strict=True) if not on_device])
    device = _joined([each for each, on_device in zip(flat, places, strict=True) if on_device])
    return Message(json.dumps(body).encode(), host, device)


def _flat(buffer: Any) -> torch.Tensor:
    if isinstance(buffer, torch.Tensor):
        dense = buffer.contiguous()  # which leaves a single number whatever stride it has
        return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    return torch.from_numpy(np.array(buffer, dtype=np.uint8).reshape(-1))


def _joined(flat: Sequence[torch.Tensor]) -> torch.Tensor:
    if not flat:
        return torch.empty(0, dtype=torch.uint8)
    sizes = [each.numel() for each in flat]
    joined = torch.zeros(_starts(sizes)[-1], dtype=torch.uint8, device=flat[0].device)
    for start, each in zip(_starts(sizes), flat, strict=False):
        joined[start : start + each.numel()] = each
    return joined


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each begins, and at last where they end."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))


def _value_of(body: dict[str, Any], host: torch.Tensor, device: torch.Tensor) -> Any:
    buffers: dict[int, torch.Tensor] = {}
    for place, flat in ((False, host), (True, device)):
        here = [(index, size) for index, (on_device, size) in enumerate(body["buffers"]) if on_device == place]
        for start, (index, size) in zip(_starts([size for _, size in here]), here, strict=False):
            buffers[index] = flat[start : start + size]
    return put_together(body["tree"], [buffers[index] for index in range(len(buffers))])
