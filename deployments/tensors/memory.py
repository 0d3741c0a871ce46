"""Errors of a device that has no memory left, whatever library raises them, and the memory that an error holds."""

from __future__ import annotations

import traceback

import torch

# What libraries say where torch's allocator is not asked: handles and workspaces of cuBLAS, cuDNN and their kin, and
# the allocators of devices whose errors are plain RuntimeErrors (MPS, NPU, the CPU).
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # what cublasCreate returns on a full device
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED and its kin
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def let_go(error: BaseException) -> None:
    """Frees what the frames of the failed call hold, such as its activations; the error keeps its text and lines."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)  # but those that still run
        each = each.__cause__ or each.__context__
