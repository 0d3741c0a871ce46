"""Which errors say that the device is full, and what such an error holds."""

import weakref

import pytest
import torch

from deployments.tensors.out_of_memory import is_out_of_memory, let_go


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.5 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}",
)
def test_a_full_device_is_known_by_what_its_libraries_say(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_other_errors_are_not_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_an_error_lets_go_of_what_its_frames_hold_and_of_those_of_its_cause() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(depth: int) -> None:
        activation = torch.zeros(10)
        held.append(weakref.ref(activation))
        try:
            if depth:
                fail(depth - 1)
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise ValueError("wrapped") from error

    try:
        fail(2)
    except ValueError as error:
        caught = error
    assert all(each() is not None for each in held)
    let_go(caught)
    assert all(each() is None for each in held)
    assert caught.__traceback__ is not None, "its lines stay"
