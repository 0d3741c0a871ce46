"""Errors of a device that has no memory left, whatever library raises them, and the memory that an error holds."""

from __future__ import annotations

import re
import traceback

import torch

# torch has a class of its own for what its allocator cannot give. What libraries allocate for themselves, and what some
# devices and the host say, are RuntimeErrors: cuBLAS (NOT_INITIALIZED is what its start says on a full device), cuDNN
# (its search for an engine ends so where there is no room to work in), cuFFT, cuSOLVER, cuSPARSE, their names on ROCm,
# torch's CPU allocator, Level Zero.
_LACKS_MEMORY = re.compile(
    r"out of memory|out_of_(?:device_|host_)?memory|OutOfMemory"
    r"|(?:STATUS|CUFFT|HIPFFT|ERROR|HOST|DEVICE)_ALLOC(?:ATION)?_FAILED|MEMORY_ALLOCATION_ERROR"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|rocblas_status_memory_error|miopenStatusAllocFailed"
    r"|FIND was unable to find an engine|(?:can't|cannot|failed to|unable to) allocate|not enough memory",
    re.IGNORECASE,
)


class KnownNotToFitError(torch.OutOfMemoryError):
    """It was not tried: nothing that could be freed here would make room for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised because the device or the host had no memory left for what was asked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_LACKS_MEMORY.search(str(error)))


def let_go(error: BaseException) -> None:
    """Frees what the frames of the failed call hold, such as its activations; the error keeps its text and lines."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)  # but those that still run
        each = each.__cause__ or each.__context__
