"""Spans as the stages and the ingress make them; no function does anything until `start` has found them asked for.

A span is the context manager of what it times. Within a process the newest one that is open is the parent of the next;
between processes `carried` goes along, in an Envelope or in the row of a job.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

from env_config.asked_traces import asked_traces
from env_config.section import EnvConfigError, Problem

Value = str | bool | int | float | Sequence[str]
Carrier = Mapping[str, str]  # W3C's headers traceparent and tracestate; empty: there is no trace

FLUSH_S = 5.0  # at most, at a stop: a collector that hangs holds up no replica


class Span(Protocol):
    """What is under way; false where nobody records it."""

    def __bool__(self) -> bool: ...

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def set(self, **attributes: Value | None) -> None:
        """Each is named `triptych.` and its name; None is left out."""

    def set_standard(self, attributes: Mapping[str, Value]) -> None:
        """By the names of OpenTelemetry's semantic conventions."""

    def rename(self, name: str) -> None: ...

    def event(self, name: str, **attributes: Value | None) -> None:
        """It happens now; attributes as of `set`."""

    def link(self, carrier: Carrier) -> None:
        """It belongs to another span too."""

    def fail(self, kind: str) -> None:
        """`kind`: the class or the code of the error; its text may repeat what the caller sent."""


class NoSpan:
    """In place of a span that nobody records; there is one, whatever is asked for."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> NoSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def set(self, **attributes: Value | None) -> None:
        pass

    def set_standard(self, attributes: Mapping[str, Value]) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def event(self, name: str, **attributes: Value | None) -> None:
        pass

    def link(self, carrier: Carrier) -> None:
        pass

    def fail(self, kind: str) -> None:
        pass


class Tracer(Protocol):
    """What makes the spans of this process."""

    def open(
        self, name: str, carrier: Carrier | None, start: float | None, attributes: Mapping[str, Value | None]
    ) -> Span:
        """A child of the carrier's span, else of the one that is open here, else the first of a trace."""

    def current(self) -> Span: ...

    def carried(self) -> Carrier: ...

    def carried_into(self, context: contextvars.Context) -> None: ...

    def stop(self, timeout_s: float) -> None: ...


NO_SPAN: Span = NoSpan()
NO_TRACE: Carrier = {}

_tracer: Tracer | None = None
_opened: Tracer | None = None  # by `start`


def start(instance: str) -> bool:
    """Whether OpenTelemetry's variables ask for traces; then this process makes them from now on.

    `instance`: a name of this process. Raises EnvConfigError for a variable that cannot be done here.
    """
    global _opened
    if _tracer is None and (asked := asked_traces()) is not None:
        from deployments.tracing.logs import tell_ids_in_logs

        try:
            from deployments.tracing.sdk import open_tracer
        except ImportError as error:
            cause = f"traces need OpenTelemetry's SDK: pip install 'triptych[tracing]' ({error})"
            raise EnvConfigError(Problem(asked.variable, asked.value, cause)) from error
        _opened = open_tracer(asked, instance)
        use(_opened)
        tell_ids_in_logs()
    return is_on()


def stop() -> None:
    """Send what waits, for FLUSH_S at most, and make no more; of no effect where `start` has begun nothing."""
    global _opened
    if _opened is not None:
        tracer, _opened = _opened, None
        use(None)
        tracer.stop(FLUSH_S)


def use(tracer: Tracer | None) -> Tracer | None:
    """From now on; returns the one before."""
    global _tracer
    before, _tracer = _tracer, tracer
    return before


def is_on() -> bool:
    return _tracer is not None


def begun(name: str, carrier: Carrier, start: float | None = None, **attributes: Value | None) -> Span:
    """A part of the carrier's trace, else of a new one. `start`: a time.time(), where it was not now."""
    return NO_SPAN if _tracer is None else _tracer.open(name, carrier or None, start, attributes)


def continued(name: str, carrier: Carrier, start: float | None = None, **attributes: Value | None) -> Span:
    """A part of the carrier's trace; nothing where it has none."""
    return NO_SPAN if _tracer is None or not carrier else _tracer.open(name, carrier, start, attributes)


def span(name: str, **attributes: Value | None) -> Span:
    """A part of what is under way here; nothing where that is not traced."""
    return NO_SPAN if _tracer is None or not _tracer.current() else _tracer.open(name, None, None, attributes)


def current() -> Span:
    """The newest one that is open here, which others end."""
    return NO_SPAN if _tracer is None else _tracer.current()


def carried() -> Carrier:
    """What makes another process's spans parts of the newest one that is open here."""
    return NO_TRACE if _tracer is None else _tracer.carried()


def carried_into(context: contextvars.Context) -> contextvars.Context:
    """The context, whose spans are parts of the newest one that is open here."""
    if _tracer is not None:
        _tracer.carried_into(context)
    return context
