"""For each alert a history of series with which it fires, and one with which it does not, in promtool's notation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.metrics.dashboard.rules import ALERTS

OF_THE_INGRESS = 'application="app", deployment="Ingress", replica="i"'
OF_A_STAGE = 'application="app", deployment="Denoiser", replica="d"'


@dataclass(frozen=True)
class Case:
    """`series`: values each minute by the series; `at`: when it is looked at."""

    alert: str
    fires: bool
    series: dict[str, str]
    at: str = "30m"


def ingress(name: str, **labels: str) -> str:
    return series(name, OF_THE_INGRESS, labels)


def stage(name: str, **labels: str) -> str:
    return series(name, OF_A_STAGE, labels)


def series(name: str, of_serve: str, labels: dict[str, str]) -> str:
    return (
        f"ray_{name}{{{', '.join([of_serve, *(f'{k}={v!r}'.replace(chr(39), chr(34)) for k, v in labels.items())])}}}"
    )


WANTED = {ingress("triptych_stages_wanted", target="Denoiser"): "1x60"}
REPLICA = stage("triptych_stage_replicas", stage="denoiser")
GOOD = ingress("triptych_requests_total", route="/v1/images/generations", outcome="2xx", status="200")
BAD = ingress("triptych_requests_total", route="/v1/images/generations", outcome="5xx", status="503")
LIMIT = {
    ingress("triptych_queue_limit_seconds", model="flux", queue="callers"): "600x60",
    ingress("triptych_queue_limit_seconds", model="wan", queue="callers"): "6000x60",
}
QUEUE, LONG_QUEUE = (ingress("triptych_queue_seconds", model=model, queue="callers") for model in ("flux", "wan"))
RECOVERIES = ingress("triptych_recoveries_total")
GIVEN_UP = ingress("triptych_given_up_total")
ENTRIES = ingress("triptych_spool_entries", entry="upload")
SPOOL_BYTES = ingress("triptych_spool_bytes")
OLDEST = ingress("triptych_spool_oldest_seconds")
CIRCUIT = ingress("triptych_storage_circuit_open")
STORE_UP = ingress("triptych_job_store_up")
OOM = stage("triptych_out_of_memory_total", stage="denoiser")
WEBHOOKS = ingress("triptych_webhooks_total", outcome="given_up")

CASES = (
    Case("TriptychStageWithoutReplica", True, {**WANTED, REPLICA: "1x10 _x50"}),
    Case("TriptychStageWithoutReplica", True, {**WANTED, REPLICA: "0x60"}),
    Case("TriptychStageWithoutReplica", True, WANTED),
    Case("TriptychStageWithoutReplica", False, {**WANTED, REPLICA: "1x60"}),
    Case("TriptychStageWithoutReplica", False, {ingress("triptych_stages_wanted", target="Denoiser"): "0x60"}),
    Case("TriptychErrors", True, {GOOD: "0+30x60", BAD: "0+3x60"}),
    Case("TriptychErrors", True, {BAD: "0+3x60"}),
    Case("TriptychErrors", False, {GOOD: "0+30x60", BAD: "0+1x60"}),
    Case("TriptychErrors", False, {GOOD: "0+30x60"}),
    Case("TriptychQueueAboveLimit", True, {**LIMIT, QUEUE: "580x60"}),
    Case("TriptychQueueAboveLimit", False, {**LIMIT, QUEUE: "300x60", LONG_QUEUE: "3000x60"}),
    Case("TriptychRecoveries", True, {RECOVERIES: "0x24 1+1x36"}),
    Case("TriptychRecoveries", False, {RECOVERIES: "0x24 1x36"}),
    Case("TriptychGivenUp", True, {GIVEN_UP: "0x25 1x35"}),
    Case("TriptychGivenUp", False, {GIVEN_UP: "0x60"}),
    Case("TriptychSpoolGrows", True, {ENTRIES: "1+1x60", SPOOL_BYTES: "1000+1000x60"}),
    Case("TriptychSpoolGrows", False, {ENTRIES: "60-1x59", SPOOL_BYTES: "60000-1000x59"}),
    Case("TriptychSpoolOld", True, {OLDEST: "0+60x60"}),
    Case("TriptychSpoolOld", False, {OLDEST: "30x60"}),
    Case("TriptychStorageAway", True, {CIRCUIT: "0x20 1x40"}),
    Case("TriptychStorageAway", False, {CIRCUIT: "0x29 1x31"}),
    Case("TriptychJobStoreAway", True, {STORE_UP: "1x20 0x40"}),
    Case("TriptychJobStoreAway", False, {STORE_UP: "1x60"}),
    Case("TriptychOutOfMemory", True, {OOM: "0x25 2x35"}),
    Case("TriptychOutOfMemory", False, {OOM: "2x60"}),
    Case("TriptychWebhooksGivenUp", True, {WEBHOOKS: "0x5 1x55"}),
    Case("TriptychWebhooksGivenUp", False, {WEBHOOKS: "0x60"}),
)


def promtool_file(rules: str) -> dict[str, Any]:
    """What `promtool test rules` reads; whether an alert fires is all that is compared, by an expression."""
    return {
        "rule_files": [rules],
        "evaluation_interval": "1m",
        "tests": [_test(case) for case in CASES],
    }


def _test(case: Case) -> dict[str, Any]:
    firing = f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}}) or vector(0)'
    return {
        "name": f"{case.alert} {'fires' if case.fires else 'does not fire'}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "promql_expr_test": [
            {"expr": firing, "eval_time": case.at, "exp_samples": [{"labels": "{}", "value": int(case.fires)}]}
        ],
    }


assert {case.alert for case in CASES} <= {alert.name for alert in ALERTS}
