"""A collector that takes OTLP over HTTP and keeps what it was sent, read by OpenTelemetry's own protocol buffers.

python -m tests.support.otlp_collector PORT      prints each trace again and again as it grows
"""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from deployments.tracing.table import PREFIX
from tests.support.traced import tree_of

FAILED = 2  # STATUS_CODE_ERROR


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it was sent; ids are hexadecimal."""

    name: str
    trace_id: str
    id: str
    parent: str | None
    began: int  # Unix time in nanoseconds
    ended: int
    attributes: dict[str, Any]  # ours without their prefix
    events: tuple[str, ...]
    has_failed: bool
    service: str
    instance: str  # the replica


class Collector:
    """What was received so far."""

    def __init__(self) -> None:
        self.url = ""
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def receive(self, body: bytes) -> None:
        spans = list(spans_in(ExportTraceServiceRequest.FromString(body)))
        with self._changed:
            self._spans += spans
            self._changed.notify_all()

    def of(self, trace_id: str) -> list[ReceivedSpan]:
        with self._changed:
            return sorted((span for span in self._spans if span.trace_id == trace_id), key=lambda span: span.began)

    def wait_for(self, trace_id: str, is_there: Callable[[list[ReceivedSpan]], bool], at_most_s: float) -> None:
        with self._changed:
            there = self._changed.wait_for(lambda: is_there(self.of(trace_id)), at_most_s)
        assert there, self.tree(trace_id)

    def tree(self, trace_id: str) -> str:
        return tree_of([(span.id, span.parent, span.name) for span in self.of(trace_id)])

    @property
    def trace_ids(self) -> list[str]:
        with self._changed:
            return list(dict.fromkeys(span.trace_id for span in self._spans))


def spans_in(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for of_resource in request.resource_spans:
        resource = {each.key: value_of(each.value) for each in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield ReceivedSpan(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex() or None,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    {each.key.removeprefix(PREFIX): value_of(each.value) for each in span.attributes},
                    tuple(event.name for event in span.events),
                    span.status.code == FAILED,
                    resource["service.name"],
                    resource["service.instance.id"],
                )


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """At `collector.url`; at any port unless one is given."""
    collector = Collector()

    class Traces(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.receive(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Traces)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()


def main(port: str) -> None:
    with collecting(int(port)) as collector:
        while True:
            with collector._changed:
                collector._changed.wait()
            for trace_id in collector.trace_ids:
                print(f"{trace_id}\n{collector.tree(trace_id)}\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
