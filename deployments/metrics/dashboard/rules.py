"""Prometheus's rules, made from a table: what is recorded, and when somebody is to be called."""

# ruff: noqa: E501  (sentences for people)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

Severity = Literal["page", "warning"]


@dataclass(frozen=True)
class Recorded:
    """An expression under a name of its own."""

    name: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """Fires when the expression has had a value for `lasts`; `action` is what to do."""

    name: str
    expression: str
    lasts: str
    severity: Severity
    summary: str
    description: str
    action: str


RECORDED = (
    Recorded("application:triptych_requests:rate5m", "sum by (application) (rate(ray_triptych_requests_total[5m]))"),
    Recorded(
        "application:triptych_request_errors:ratio5m",
        '(sum by (application) (rate(ray_triptych_requests_total{outcome="5xx"}[5m])) '
        "or 0 * application:triptych_requests:rate5m) / application:triptych_requests:rate5m",
    ),
    Recorded(
        "application:triptych_request_seconds:p95_5m",
        "histogram_quantile(0.95, sum by (application, le) ((ray_triptych_request_seconds_bucket unless "
        "ray_triptych_request_seconds_bucket offset 5m) or increase(ray_triptych_request_seconds_bucket[5m])))",
    ),
    Recorded(
        "application_stage:triptych_stage_busy:share5m",
        "sum by (application, stage) (rate(ray_triptych_stage_busy_seconds_total[5m])) "
        "/ sum by (application, stage) (ray_triptych_stage_replicas)",
    ),
    Recorded("application:triptych_steps:rate5m", "sum by (application) (rate(ray_triptych_steps_total[5m]))"),
)

WANTED = (
    'max by (application, deployment) (label_replace(ray_triptych_stages_wanted, "deployment", "$1", "target", "(.+)"))'
)

ALERTS = (
    Alert(
        "TriptychStageWithoutReplica",
        f"{WANTED} > 0 unless on (application, deployment) "
        "(sum by (application, deployment) (ray_triptych_stage_replicas) > 0)",
        "1m",
        "page",
        "{{ $labels.application }}: no replica of {{ $labels.deployment }} works",
        "Requests wait for this stage, and nothing is made until it is back.",
        "`serve status` says why no replica starts; GET /health has the same in short. Often it is a variable, the "
        "memory of the device, or a node that is gone.",
    ),
    Alert(
        "TriptychErrors",
        "application:triptych_request_errors:ratio5m > 0.05 and application:triptych_requests:rate5m > 0.01",
        "5m",
        "page",
        "{{ $labels.application }}: {{ $value | humanizePercentage }} of answers are 5xx",
        "More than one answer of twenty has been an error of the server for five minutes.",
        "Look at triptych_requests_total by route and status: 503 is a stage that is away (`serve status`), 500 has its "
        "reason in the log of the ingress, beside the x-request-id of the answer.",
    ),
    Alert(
        "TriptychQueueAboveLimit",
        'max by (application, model) (ray_triptych_queue_seconds{queue="callers"}) '
        '> 0.9 * max by (application, model) (ray_triptych_queue_limit_seconds{queue="callers"})',
        "2m",
        "warning",
        "{{ $labels.application }}: the queue of {{ $labels.model }} is at its bound",
        "Callers are refused with 429, or soon will be.",
        "Add replicas of the stage whose busy share is highest (docs/autoscaling.md), or raise admission.max_queue_s where "
        "callers may wait longer.",
    ),
    Alert(
        "TriptychRecoveries",
        "sum by (application) (increase(ray_triptych_recoveries_total[10m])) > 3",
        "0m",
        "warning",
        "{{ $labels.application }}: replicas die under requests",
        "{{ $value | humanize }} requests have gone on elsewhere within ten minutes, after the death of their replica.",
        "`serve status` and Ray's dashboard say what ended the replicas: often memory. A request that is to blame is "
        "tried alone and given up (triptych_given_up_total).",
    ),
    Alert(
        "TriptychGivenUp",
        "sum by (application) (increase(ray_triptych_given_up_total[10m])) > 0",
        "0m",
        "warning",
        "{{ $labels.application }}: a request ends every replica that works on it",
        "It was tried alone, ended its replicas again, and was given up.",
        "The log of the ingress names the request after 'a replica died'. Run it by "
        "`python -m serve_app.tools.verify` beside the cluster; limits in the args keep its kind out.",
    ),
    Alert(
        "TriptychSpoolGrows",
        'max by (application, instance) (ray_triptych_spool_entries{entry="upload"}) > 0 '
        "and max by (application, instance) (deriv(ray_triptych_spool_bytes[15m])) > 0",
        "10m",
        "warning",
        "{{ $labels.application }}: outputs pile up in the spool of {{ $labels.instance }}",
        "The storage has taken less than is made for ten minutes. Nothing is lost while the machine and its volume live.",
        "Look at triptych_storage_seconds by outcome and the ingress's log: credentials, the bucket, the network. Keep the "
        "machine and its volume until the spool is empty.",
    ),
    Alert(
        "TriptychSpoolOld",
        "max by (application) (ray_triptych_spool_oldest_seconds) > 900",
        "5m",
        "warning",
        "{{ $labels.application }}: an output has waited in the spool for {{ $value | humanizeDuration }}",
        "Nobody has tried to upload it for so long, though that is tried all the time.",
        "Is an ingress replica running on that machine? Only one that sees its volume can upload from there.",
    ),
    Alert(
        "TriptychStorageAway",
        "max by (application) (ray_triptych_storage_circuit_open) > 0",
        "2m",
        "page",
        "{{ $labels.application }}: the storage does not answer",
        "Calls to it are made only from time to time; outputs go to the spool, where the storage is S3.",
        "Check the endpoint, the credentials and the network of the ingress's node; it is found again by itself.",
    ),
    Alert(
        "TriptychJobStoreAway",
        "min by (application) (ray_triptych_job_store_up) < 1",
        "1m",
        "page",
        "{{ $labels.application }}: the job store does not answer",
        "No job can be taken, looked at or ended; those that run go on.",
        "Check the database of jobs.store_url, or the volume of jobs.sqlite (full, read-only). Jobs go on by themselves.",
    ),
    Alert(
        "TriptychOutOfMemory",
        "sum by (application, stage) (increase(ray_triptych_out_of_memory_total[10m])) > 0",
        "0m",
        "warning",
        "{{ $labels.application }}: {{ $labels.stage }} has run out of memory on its device",
        "Such requests are tried again in smaller parts, or wait for others to leave the device: they are slow, or fail.",
        "`python -m serve_app.tools.plan` says what fits: offload, precision, tiling, smaller limits or batches.",
    ),
    Alert(
        "TriptychWebhooksGivenUp",
        'sum by (application) (increase(ray_triptych_webhooks_total{outcome="given_up"}[1h])) > 0',
        "0m",
        "warning",
        "{{ $labels.application }}: webhooks were given up",
        "Their receivers have not answered any of the tries.",
        "The log of the ingress names the webhooks; the jobs are kept, and their callers can ask for them.",
    ),
)


def rules_file() -> str:
    """The file, as YAML."""
    groups = [
        {"name": "triptych-recorded", "rules": [{"record": r.name, "expr": r.expression} for r in RECORDED]},
        {"name": "triptych", "rules": [_alert(alert) for alert in ALERTS]},
    ]
    head = "# Made from deployments/metrics/dashboard/rules.py by `python -m deployments.metrics.write`.\n"
    return head + yaml.safe_dump({"groups": groups}, sort_keys=False, width=110)


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.lasts,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.description, "action": alert.action},
    }
