"""Whether memory was lacking is told from the error alone, whichever library or device says it."""

import pytest
import torch

from deployments.tensors.out_of_memory import is_out_of_memory

# As their sources word them.
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.68 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.44 GB, max allowed: 18.13 GB)"),
    RuntimeError("NPU out of memory. Tried to allocate 1.00 GiB (NPU 0; 29.50 GiB total capacity)"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4294967296 bytes."),
    MemoryError(),
]
DOES_NOT = [
    RuntimeError("shape '[2, 3]' is invalid for input of size 7"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Expected all tensors to be on the same device"),
    ValueError("out of memory"),
    KeyError("memory"),
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: str(error)[:40])
def test_memory_was_lacking(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", DOES_NOT, ids=lambda error: str(error)[:40])
def test_something_else_was_wrong(error: Exception) -> None:
    assert not is_out_of_memory(error)
