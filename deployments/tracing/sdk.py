"""Spans by OpenTelemetry's SDK; the only module that imports it.

The provider is this application's own and not the process's global one: what other libraries would trace with that
stays as they were set up. The SDK reads its variables itself: the sampler, the limits, the batches, and where an
exporter sends to. W3C's trace context is the one propagator; baggage is neither read nor sent.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.tracing.spans import NO_SPAN, Carrier, Span, Value
from deployments.tracing.table import PREFIX, SPANS
from env_config.asked_traces import EXPORTER, OTLP, AskedTraces
from env_config.own_version import own_version
from env_config.section import EnvConfigError, Problem

ENTRY_POINTS = "opentelemetry_traces_exporter"
HOW_TO_GET = {
    OTLP["http/protobuf"]: "pip install 'triptych[tracing]'",
    OTLP["grpc"]: "pip install opentelemetry-exporter-otlp-proto-grpc",
}
PROPAGATOR = TraceContextTextMapPropagator()


def open_tracer(asked: AskedTraces, instance: str) -> SDKTracer:
    """Raises EnvConfigError for an exporter that is not installed, or cannot be made."""
    exporters = [_exporter(name, asked) for name in asked.exporters]
    # The end of the process waits for no collector; a replica that is stopped calls `stop`.
    provider = TracerProvider(resource=_resource(asked, instance), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return SDKTracer(provider)


def _exporter(name: str, asked: AskedTraces) -> SpanExporter:
    found = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    how = HOW_TO_GET.get(name, "install its package")
    if name not in found:
        known = ", ".join(["none", *sorted(found)])
        cause = f"traces need the exporter {name}: {how}; or set {EXPORTER} to one of {known}"
        raise EnvConfigError(Problem(asked.variable, asked.value, cause))
    try:
        exporter: SpanExporter = found[name].load()()
    except ImportError as error:
        cause = f"a part of the exporter {name} is missing ({error}): {how}"
        raise EnvConfigError(Problem(asked.variable, asked.value, cause)) from error
    except Exception as error:
        cause = f"the exporter {name} cannot be made: {error}"
        raise EnvConfigError(Problem(asked.variable, asked.value, cause)) from error
    return exporter


def _resource(asked: AskedTraces, instance: str) -> Resource:
    """What the variables say of the service, and what they leave open."""
    told = Resource.create()
    own = {SERVICE_VERSION: own_version(), SERVICE_INSTANCE_ID: instance}
    if not asked.has_service_name:
        own[SERVICE_NAME] = "triptych"
    return told.merge(Resource(own))


class SDKTracer:
    """Makes spans with a provider; safe to call from any thread."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("triptych", own_version())

    def open(
        self, name: str, carrier: Carrier | None, start: float | None, attributes: Mapping[str, Value | None]
    ) -> Span:
        parent = None if carrier is None else PROPAGATOR.extract(dict(carrier), contexts.Context())
        if parent is not None and not trace.get_current_span(parent).get_span_context().is_valid:
            parent = None  # a header that is none, as the standard says
        span = self._tracer.start_span(
            name,
            parent,
            SpanKind[SPANS[name].kind],
            named(attributes),
            start_time=None if start is None else int(start * 1e9),
            record_exception=False,  # its text may repeat what the caller sent
            set_status_on_exception=False,
        )
        return OpenSpan(span)

    def current(self) -> Span:
        span = trace.get_current_span()
        return OpenSpan(span) if span.get_span_context().is_valid else NO_SPAN

    def carried(self) -> Carrier:
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier)
        return carrier

    def carried_into(self, context: contextvars.Context) -> None:
        context.run(contexts.attach, trace.set_span_in_context(trace.get_current_span(), contexts.Context()))

    def stop(self, timeout_s: float) -> None:
        stopping = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        stopping.start()
        stopping.join(timeout_s)


class OpenSpan:
    """A span of the SDK, open from here on."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._token: Any = None

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> OpenSpan:
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        if isinstance(error, Exception):
            self.fail(type(getattr(error, "cause", None) or error).__name__)  # Ray's errors name what they wrap
        elif error is not None:
            self.set(cancelled=True)
        self._span.end()

    def set(self, **attributes: Value | None) -> None:
        self._span.set_attributes(named(attributes))

    def set_standard(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def event(self, name: str, **attributes: Value | None) -> None:
        self._span.add_event(name, named(attributes))

    def link(self, carrier: Carrier) -> None:
        other = trace.get_current_span(PROPAGATOR.extract(dict(carrier), contexts.Context())).get_span_context()
        if other.is_valid:
            self._span.add_link(other)

    def fail(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))


def named(attributes: Mapping[str, Value | None]) -> dict[str, Value]:
    """With their prefix; those that are None are left out."""
    return {f"{PREFIX}{name}": value for name, value in attributes.items() if value is not None}
