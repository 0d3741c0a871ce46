"""The locks under which the code of pipelines and its components run, and which thread has the former."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class PipelineCode:
    """A lock that knows its holder: who waits for it does nothing, however long another one works."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._holder: int | None = None  # a thread
        self._passed_at = 0.0  # when it was taken or let go of at last, by the clock

    def acquire(self) -> None:
        self._lock.acquire()
        self._holder, self._passed_at = threading.get_ident(), self._clock()

    def release(self) -> None:
        self._holder, self._passed_at = None, self._clock()
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def waited_until(self, thread: int | None) -> float | None:
        """By the clock, until when that thread may have waited for the lock; None while another one has it."""
        return self._passed_at if self._holder in (None, thread) else None


# Code of pipelines runs one thread at a time: tokenizers and causal VAEs keep state, and torch's global generators
# belong to one request at a time. It is let go of while a request waits for the device or another stage.
PIPELINE_CODE = PipelineCode()

# Held while a component other than a denoiser is called: causal VAEs keep state between their chunks, and hooks are on
# shared modules. A decoding goes on with this lock alone. Nobody waits for it while he holds the other one.
COMPONENT_CALL = threading.Lock()
