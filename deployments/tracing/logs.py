"""`trace_id` and `span_id` in the structured lines of Serve's log (`logging_config: {encoding: JSON}`)."""

from __future__ import annotations

import logging

from deployments.tracing import spans

HANDLERS_OF = "ray.serve"  # whose handlers our loggers have too


class TraceIds(logging.Filter):
    """Lets every record through."""

    def filter(self, record: logging.LogRecord) -> bool:
        carrier = spans.carried()
        if carrier:
            _, record.trace_id, record.span_id, _ = carrier["traceparent"].split("-")
        return True


def tell_ids_in_logs() -> None:
    for handler in logging.getLogger(HANDLERS_OF).handlers:
        handler.addFilter(TraceIds())
