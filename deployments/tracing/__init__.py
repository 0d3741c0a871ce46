"""OpenTelemetry traces: where a request was and for how long. Without its variables nothing is made."""

from deployments.tracing.spans import (
    NO_SPAN,
    Carrier,
    Span,
    begun,
    carried,
    carried_into,
    continued,
    current,
    is_on,
    span,
    start,
    stop,
)

__all__ = [
    "NO_SPAN",
    "Carrier",
    "Span",
    "begun",
    "carried",
    "carried_into",
    "continued",
    "current",
    "is_on",
    "span",
    "start",
    "stop",
]
