"""Tells the errors that the arguments of a request can cause in a pipeline's own code from those that they cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.errors import PipelineFailedError

# A wrong type, length, name or number shows itself as one of these.
CAUSED_BY_ARGUMENTS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    UnboundLocalError,
)
# torch has one class for wrong shapes and for most of what a device does; its subclasses are never about shapes.
_OF_SHAPES = re.compile(
    r"shape|size|dimension|\bdims?\b|channels|elements|length|index|batch|range|negative|empty|overflow|must match"
    r"|expected|invalid|not divisible|dtype|ScalarType|infinite",
    re.IGNORECASE,
)
_OF_DEVICES = re.compile(
    r"out of memory|allocat|cuda|cublas|cudnn|cufft|nccl|gloo|\bhip|rocm|miopen|\bmps\b|\bxpu\b|\bnpu\b|\bmusa\b|driver"
    r"|device-side|same device|launch failure|no kernel image|onednn|mkldnn|could not create a primitive|triton",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|/)[^\s'\",:;()]*[/\\][^\s'\",:;()]*")
MAX_CHARS = 300


@contextmanager
def pipeline_errors() -> Iterator[None]:
    """Raises PipelineFailedError in place of an error of the pipeline's own code that arguments can cause."""
    try:
        yield
    except Exception as error:
        if not is_caused_by_arguments(error):
            raise
        raise PipelineFailedError(told(error)) from error


def is_caused_by_arguments(error: Exception) -> bool:
    """Out of memory and what devices say are never the caller's."""
    text = str(error)
    if type(error) is RuntimeError:
        return bool(_OF_SHAPES.search(text)) and not _OF_DEVICES.search(text)
    return isinstance(error, CAUSED_BY_ARGUMENTS)


def told(error: Exception) -> str:
    """The error as one line for callers: no stack, no path of this machine."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = _PATH.sub("(a path)", line)[:MAX_CHARS]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
