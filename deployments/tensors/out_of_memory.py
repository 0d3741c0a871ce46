"""Tells that memory was lacking from whatever else a device or a library raises."""

from __future__ import annotations

import re

import torch

# torch has a class of its own for what its allocator cannot give. What libraries allocate for themselves, and what some
# devices and the host say, are RuntimeErrors: cuBLAS, cuDNN (its search for an engine ends so where there is no room to
# work in), cuFFT, cuSOLVER, cuSPARSE, their names on ROCm, torch's CPU allocator, Level Zero.
_LACKS_MEMORY = re.compile(
    r"out of memory|out_of_(?:device_|host_)?memory|OutOfMemory"
    r"|(?:STATUS|CUFFT|HIPFFT|ERROR|HOST|DEVICE)_ALLOC(?:ATION)?_FAILED|MEMORY_ALLOCATION_ERROR"
    r"|FIND was unable to find an engine|(?:can't|cannot|failed to|unable to) allocate|not enough memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised because the device or the host had no memory left for what was asked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_LACKS_MEMORY.search(str(error)))
