"""Spans that are kept in this process, and held against the table of spans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.tracing import spans
from deployments.tracing.sdk import SDKTracer
from deployments.tracing.table import EVERYWHERE, EVERYWHERE_STANDARD, PREFIX, SPANS


class Traces:
    """The spans that have ended, in the order in which they began."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def forget(self) -> None:
        self._exporter.clear()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def tree(self) -> str:
        """The names, each below its parent and two spaces further in."""
        return tree_of([(id_of(span), parent_of(span), span.name) for span in self.spans])

    @property
    def text(self) -> str:
        """All that would be sent."""
        return json.dumps([json.loads(span.to_json()) for span in self.spans])


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def tree_of(rows: list[tuple[Any, Any, str]]) -> str:
    """`rows`: the id of each span, that of its parent, and its name; a parent that is no row is elsewhere."""
    known = {row[0] for row in rows}

    def below(parent: Any, depth: int) -> Iterator[str]:
        for each, of, name in rows:
            if of == parent or (parent is None and of not in known):
                yield "  " * depth + name
                yield from below(each, depth + 1)

    return "\n".join(below(None, 0))


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    """Ours, without their prefix."""
    return {name.removeprefix(PREFIX): value for name, value in (span.attributes or {}).items()}


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


@contextmanager
def tracing_here() -> Iterator[Traces]:
    """At the end, what was made is all in the table."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    before = spans.use(SDKTracer(provider))
    made = Traces(exporter)
    try:
        yield made
    finally:
        spans.use(before)
    assert unknown_in(made.spans) == []


def unknown_in(made: list[ReadableSpan]) -> list[str]:
    """Spans, attributes and events that have no row."""
    unknown = []
    for span in made:
        attributes = set(span.attributes or {})
        row = SPANS.get("request" if "http.request.method" in attributes else span.name)
        if row is None:
            unknown.append(span.name)
            continue
        known = {PREFIX + name for name in (*row.attributes, *EVERYWHERE)} | {*row.standard, *EVERYWHERE_STANDARD}
        unknown += [f"{span.name}: {name}" for name in attributes - known]
        unknown += [f"{span.name}: {event}" for event in events_of(span) if event not in row.events]
        if row.kind != span.kind.name:
            unknown.append(f"{span.name} is {span.kind.name}")
    return unknown


@pytest.fixture
def traces() -> Iterator[Traces]:
    with tracing_here() as made:
        yield made
