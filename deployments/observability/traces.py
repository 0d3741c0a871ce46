"""A span for what a stage does for a request whose ingress traces it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from deployments import tracing
from deployments.observability.observer import ObservedReplica, Observer, StageWork
from deployments.tracing import Span


class StageTraces(Observer):
    """The span lasts from the arrival of a request until it has left, in `work.span`."""

    @contextmanager
    def present(self, work: StageWork) -> Iterator[Span]:
        with tracing.continued(
            work.stage,
            work.envelope.trace,
            work.arrived,
            request_id=work.request.request_id,
            bytes_in=work.bytes_in,
            transfer_s=max(0.0, work.arrived - work.sent) if work.sent else None,
        ) as span:
            work.span = span
            yield span

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        work.span.set(waiting_s=time.time() - work.arrived)
        yield
        work.span.set(bytes_out=work.bytes_out)


def make_traces(replica: ObservedReplica) -> StageTraces | None:
    """Where OpenTelemetry's variables ask for traces. Raises EnvConfigError for one that cannot be done here."""
    return StageTraces() if tracing.start(replica.replica_id) else None
