"""Whether OpenTelemetry's own variables ask for traces. How they are made and sent, its SDK reads from them itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from env_config.section import EnvConfigError, Problem, read_environ

EXPORTER = "OTEL_TRACES_EXPORTER"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
DISABLED = "OTEL_SDK_DISABLED"
OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # as their packages call themselves
NAMES = ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")


@dataclass(frozen=True)
class AskedTraces:
    """What asks for traces, and where they are to go."""

    variable: str  # that asks for them
    value: str  # of it, as it may be shown
    exporters: tuple[str, ...]  # names of the entry points `opentelemetry_traces_exporter`
    has_service_name: bool  # one is given


def asked_traces(environ: Mapping[str, str] | None = None) -> AskedTraces | None:
    """None where no exporter and no endpoint is set, or OTEL_SDK_DISABLED is true. Raises EnvConfigError."""
    told = read_environ(environ)
    if told.get(DISABLED, "").lower() == "true":
        return None
    endpoint = next((name for name in ENDPOINTS if name in told), None)
    asked = told.get(EXPORTER, "otlp" if endpoint else "none")
    names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if names in ([], ["none"]):
        return None
    if "none" in names:
        raise EnvConfigError(Problem(EXPORTER, asked, "none stands alone"))
    exporters = tuple(_otlp(told) if name == "otlp" else name for name in names)
    variable = EXPORTER if EXPORTER in told else str(endpoint)
    value = re.sub(r"//.*@", "//***@", told[variable])
    has_name = NAMES[0] in told or "service.name=" in told.get(NAMES[1], "").replace(" ", "")
    return AskedTraces(variable, value, exporters, has_name)


def _otlp(told: Mapping[str, str]) -> str:
    variable = next((name for name in PROTOCOLS if name in told), PROTOCOLS[1])
    protocol = told.get(variable, "http/protobuf")
    if protocol not in OTLP:
        raise EnvConfigError(Problem(variable, protocol, f"traces are sent by {' or '.join(OTLP)}"))
    return OTLP[protocol]
