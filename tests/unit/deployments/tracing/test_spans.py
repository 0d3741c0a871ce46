"""Who asks for traces, what they cost where nobody does, and a collector that is dead."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from deployments import tracing
from deployments.tracing import spans
from deployments.tracing.logs import TraceIds
from deployments.tracing.sdk import SDKTracer, open_tracer
from env_config.asked_traces import AskedTraces, asked_traces
from env_config.section import EnvConfigError
from tests.support.in_process import serving
from tests.support.traced import Traces, attributes_of, id_of, trace_of, traces

__all__ = ["traces"]

ROOT = Path(__file__).resolve().parents[4]
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:password@collector:4318"}
OFF = {
    "nothing": {},
    "a blank endpoint": {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    "other variables": {"OTEL_SERVICE_NAME": "pictures", "OTEL_TRACES_SAMPLER": "always_on"},
    "metrics alone": {"OTEL_METRICS_EXPORTER": "otlp"},
    "none": ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
    "the SDK is off": ENDPOINT | {"OTEL_SDK_DISABLED": "TRUE"},
}
ON = {
    "an endpoint": (ENDPOINT, ("otlp_proto_http",)),
    "one of traces": ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, ("otlp_proto_http",)),
    "an exporter": ({"OTEL_TRACES_EXPORTER": "console"}, ("console",)),
    "several": ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ("otlp_proto_http", "console")),
    "a protocol": (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
}
WRONG = {
    "none with others": (
        {"OTEL_TRACES_EXPORTER": "none,otlp"},
        "OTEL_TRACES_EXPORTER = 'none,otlp': none stands alone",
    ),
    "no protocol": (
        ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
        "OTEL_EXPORTER_OTLP_PROTOCOL = 'http/json': traces are sent by http/protobuf or grpc",
    ),
}


@pytest.mark.parametrize("variables", OFF.values(), ids=OFF)
def test_traces_are_off_unless_they_are_asked_for(variables: dict[str, str]) -> None:
    assert asked_traces(variables) is None


@pytest.mark.parametrize(("variables", "exporters"), ON.values(), ids=ON)
def test_an_exporter_or_an_endpoint_asks_for_traces(variables: dict[str, str], exporters: tuple[str, ...]) -> None:
    asked = asked_traces(variables)
    assert asked is not None
    assert asked.exporters == exporters
    assert "password" not in asked.value


@pytest.mark.parametrize(("variables", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked_for_is_named(variables: dict[str, str], said: str) -> None:
    with pytest.raises(EnvConfigError) as error:
        asked_traces(variables)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["otlp_proto_http", "otlp_proto_grpc", "nobody"])
def test_an_exporter_that_is_not_installed_is_a_start_up_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [each for each in entry_points(group="opentelemetry_traces_exporter") if each.name == "console"]
    monkeypatch.setattr("deployments.tracing.sdk.entry_points", lambda group: installed)
    asked = AskedTraces("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318", (name,), has_service_name=False)
    with pytest.raises(EnvConfigError) as error:
        open_tracer(asked, "replica")
    said = str(error.value)
    assert "OTEL_EXPORTER_OTLP_ENDPOINT = 'http://collector:4318': traces need the exporter" in said
    assert ("triptych[tracing]" in said) == (name == "otlp_proto_http")
    assert "OTEL_TRACES_EXPORTER to one of none, console" in said


def test_traces_without_the_sdk_are_a_start_up_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deployments.tracing.sdk", None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    with pytest.raises(EnvConfigError) as error:
        tracing.start("replica")
    assert "OTEL_TRACES_EXPORTER = 'console': traces need OpenTelemetry's SDK: pip install 'triptych[tracing]'" in str(
        error.value
    )
    assert not tracing.is_on()


def test_without_the_variables_nothing_is_imported_and_no_span_is_made() -> None:
    code = (
        "import contextvars, sys; from deployments import tracing as t; "
        "assert t.start('replica') is False; "
        "made = [t.span('make', n=1), t.begun('request', {}), t.continued('vae', {'traceparent': 'x'}), t.current()]; "
        "assert all(each is t.NO_SPAN for each in made); "
        "assert t.carried() == {}; t.carried_into(contextvars.Context()); t.stop(); "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PATH": ""})


def test_the_service_is_named_by_the_variables_else_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, name in (({}, "triptych"), ({"OTEL_SERVICE_NAME": "pictures"}, "pictures")):
        for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in ({"OTEL_TRACES_EXPORTER": "console"} | variables).items():
            monkeypatch.setenv(variable, value)
        asked = asked_traces()
        assert asked is not None
        tracer = open_tracer(asked, "replica-7")
        resource = tracer._provider.resource.attributes
        assert (resource["service.name"], resource["service.instance.id"]) == (name, "replica-7")
        tracer.stop(10)


def test_a_span_outside_of_a_trace_is_none_and_a_replica_begins_none(traces: Traces) -> None:
    with tracing.span("make"), tracing.continued("vae", {}), tracing.continued("vae", tracing.carried()):
        pass
    assert traces.spans == []


def test_an_error_is_told_by_its_class_and_a_cancelled_span_is_no_error(traces: Traces) -> None:
    with pytest.raises(ValueError), tracing.begun("job", {}):
        raise ValueError("what the caller wrote")
    with pytest.raises(KeyboardInterrupt), tracing.begun("job", {}):
        raise KeyboardInterrupt
    failed, cancelled = traces.spans
    assert attributes_of(failed) == {"error.type": "ValueError"}
    assert not failed.status.is_ok
    assert attributes_of(cancelled) == {"cancelled": True}
    assert cancelled.status.is_unset
    assert "wrote" not in traces.text


def test_lines_of_the_log_have_the_ids(traces: Traces) -> None:
    inside, outside = (logging.makeLogRecord({}) for _ in range(2))
    with tracing.begun("job", {}):
        assert TraceIds().filter(inside)
    assert TraceIds().filter(outside)
    job = traces.one("job")
    assert vars(inside)["trace_id"] == trace_of(job)
    assert vars(inside)["span_id"] == f"{id_of(job):016x}"
    assert not hasattr(outside, "trace_id")


class Hanging(SpanExporter):
    """A collector that takes a batch and never answers."""

    def __init__(self) -> None:
        self.has_begun, self.released = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.has_begun.set()
        self.released.wait()
        return SpanExportResult.FAILURE


async def test_a_collector_that_hangs_holds_up_neither_requests_nor_a_stop(tmp_path: Path) -> None:
    exporter = Hanging()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=4, max_export_batch_size=1, schedule_delay_millis=1)
    )
    tracer = SDKTracer(provider)
    before = spans.use(tracer)
    try:
        with serving(tmp_path / "outputs") as server:
            for seed in range(3):  # more spans than the queue takes
                body = {"prompt": "a fox", "seed": seed}
                assert (await server.post("/v1/images/generations", json=body)).status_code == 200
        assert exporter.has_begun.wait(60)
        tracer.stop(0.01)
        assert not exporter.released.is_set(), "it was still hanging"
    finally:
        spans.use(before)
        exporter.released.set()
