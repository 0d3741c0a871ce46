"""What a pipeline's own code raises is told as a failure of the request; what devices say never is."""

from __future__ import annotations

import pickle

import pytest
import torch

from deployments.errors import InvalidRequestError, NotNumbersError, PipelineFailedError
from deployments.stage_pipeline.pipeline_errors import pipeline_errors

BY_ARGUMENTS = [
    TypeError("unsupported operand type(s) for -: 'str' and 'int'"),
    ValueError("bad"),
    IndexError("tuple index out of range"),
    KeyError("scale"),
    AttributeError("'int' object has no attribute 'get'"),
    ZeroDivisionError("division by zero"),
    OverflowError("cannot convert float infinity to integer"),
    AssertionError(),
    UnboundLocalError("x"),
    NotImplementedError("only"),
    RuntimeError("The size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 0"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
    RuntimeError("Trying to create tensor with negative dimension -1: [-1]"),
    RuntimeError(
        "Calculated padded input size per channel: (1 x 1). Kernel size can't be greater than actual input size"
    ),
    RuntimeError("cannot reshape tensor of 0 elements into shape [0, -1]"),
]
OF_DEVICES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: size 99 bytes"),
    RuntimeError("CUDA error: device-side assert triggered, index out of range"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED on a tensor of size 3"),
    RuntimeError("HIP error: invalid device function"),
    RuntimeError("boom"),
    MemoryError(),
    OSError("disk"),
]


@pytest.mark.parametrize("error", BY_ARGUMENTS, ids=lambda error: f"{type(error).__name__} {error}"[:50])
def test_what_arguments_can_cause_is_told_with_its_own_words(error: Exception) -> None:
    with pytest.raises(PipelineFailedError) as caught, pipeline_errors():
        raise error
    assert str(caught.value).startswith(type(error).__name__)
    assert str(error).strip("'") in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OF_DEVICES, ids=lambda error: f"{type(error).__name__} {error}"[:50])
def test_what_devices_say_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, pipeline_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [InvalidRequestError("no", "prompt"), NotNumbersError()], ids=str)
def test_an_error_that_was_raised_on_purpose_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, pipeline_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('first line\n  File "/a/b.py", line 3', "ValueError: first line"),
        ("no file /root/models/x/y.json here", "ValueError: no file (a path) here"),
        ("cannot read '/srv/a b/c'", "ValueError: cannot read '(a path) b/c'"),
        ("either 1/2 or and/or", "ValueError: either 1/2 or and/or"),
        ("x" * 1000, "ValueError: " + "x" * 300),
        ("", "ValueError"),
    ],
)
def test_callers_see_one_line_without_paths(text: str, told: str) -> None:
    with pytest.raises(PipelineFailedError) as caught, pipeline_errors():
        raise ValueError(text)
    assert str(caught.value) == told


@pytest.mark.parametrize("error", [PipelineFailedError("KeyError: 'x'"), NotNumbersError(), NotNumbersError("sound")])
def test_they_travel_from_replica_to_replica(error: Exception) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
