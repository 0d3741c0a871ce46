"""A value for another process: its arrays lie in memory that both see, and only the rest goes through the pipe.

The memory is a file without a name. It is gone when nobody has it open any more, however a process ends, and it does
not count against the size of /dev/shm, which is 64 MB in many containers.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import IO, Any

ALIGNMENT = 64  # bytes: that of any number


@dataclass(frozen=True)
class Shared:
    """A value that is ready to be sent, to one process or to several."""

    pickled: bytes  # without its arrays
    places: tuple[tuple[int, int], ...]  # where each of its arrays begins and ends in the memory
    memory: IO[bytes]


@contextmanager
def in_shared_memory(value: Any) -> Iterator[Shared]:
    """The value until the block ends; a receiver keeps what it has received. Raises OSError where there is no room.

    Arrays whose numbers do not lie one behind the other go through the pipe.
    """
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    with _memory() as memory:
        places = []
        for array in arrays:
            begin = memory.seek(-(-memory.tell() // ALIGNMENT) * ALIGNMENT)
            memory.write(array.raw())  # lets other threads run
            places.append((begin, memory.tell()))
        memory.flush()
        yield Shared(pickled, tuple(places), memory)


def send(connection: Connection, shared: Shared) -> None:
    """Raises OSError when the other process is gone."""
    connection.send((shared.pickled, shared.places))
    if shared.places:
        reduction.send_handle(connection, shared.memory.fileno(), None)


def receive(connection: Connection) -> Any:
    """The value; its arrays can be read only. Raises EOFError or OSError when the other process is gone."""
    pickled, places = connection.recv()
    if not places:
        return pickle.loads(pickled)
    descriptor = reduction.recv_handle(connection)
    try:
        seen = memoryview(mmap.mmap(descriptor, places[-1][1], access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
    return pickle.loads(pickled, buffers=[seen[begin:end] for begin, end in places])


def _memory() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("triptych-media"), "w+b")
    return tempfile.TemporaryFile()
