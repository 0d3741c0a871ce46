"""Prometheus finds what the table of metrics declares, and nothing else of ours, at the port of Ray's node."""

from __future__ import annotations

import time

import httpx
import pytest

from deployments.metrics.metric import OF_SERVE
from deployments.metrics.table import METRICS
from tests.support.scrape import Scrape, scrape
from tests.support.served_application import ServedApplication

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray

PATIENCE_S = 90  # Ray passes metrics on every 10 s
OF_RAY = {
    "SessionName",
    "WorkerId",
    "NodeAddress",
    "Version",
    "Component",
    "JobId",
    "node_type",
    "NodeId",
    "ip",
    "pid",
} | {f"otel_scope_{name}" for name in ("name", "version", "schema_url")}
# What one picture, one job and one mistake must have moved, and how the stages stand.
MOVED = {
    "triptych_requests_total", "triptych_request_seconds", "triptych_key_requests_total", "triptych_key_made_total",
    "triptych_key_compute_seconds_total", "triptych_queue_limit_seconds", "triptych_attempts_total",
    "triptych_made_total", "triptych_model_info", "triptych_model_requests_total", "triptych_stages_wanted",
    "triptych_jobs_taken_total",
    "triptych_jobs_ended_total", "triptych_job_seconds", "triptych_job_wait_seconds", "triptych_job_store_up",
    "triptych_storage_seconds", "triptych_stored_bytes_total", "triptych_stage_replicas",
    "triptych_stage_queue_seconds", "triptych_stage_seconds", "triptych_stage_requests_total",
    "triptych_stage_busy_seconds_total", "triptych_stage_bytes_total", "triptych_steps_total", "triptych_batch_size",
    "triptych_forwards_total", "triptych_step_seconds", "triptych_device_seconds_total",
    "triptych_step_queue_seconds", "triptych_media_seconds", "triptych_media_bytes_total", "triptych_media_workers",
}  # fmt: skip


def make_traffic(served: ServedApplication) -> None:
    served.pictures(prompt="a small cat", response_format="url")
    assert served.generate(prompt="a small cat", num_inference_steps=-1).status_code == 400
    body = {"prompt": "a small cat"}
    headers = {"prefer": "wait=60"}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text


def scraped_once_all_have_moved(port: int) -> Scrape:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        found = scrape(port)
        still = {name for name in MOVED if not found.total(name)}
        if not still:
            return found
        assert time.monotonic() < give_up, f"these have not moved: {sorted(still)}"
        time.sleep(3)


def test_a_scrape_after_traffic_has_every_metric_that_it_must_move_and_none_that_is_not_declared(
    served: ServedApplication, metrics_port: int
) -> None:
    make_traffic(served)

    found = scraped_once_all_have_moved(metrics_port)

    assert {name: METRICS[name].kind for name in found.kinds} == found.kinds
    for sample in found.samples:
        expected = {*METRICS[sample.name].labels, *(["le"] if sample.part == "_bucket" else [])}
        assert expected <= sample.labels.keys() <= expected | {*OF_SERVE} | OF_RAY, sample
    route = "/v1/images/generations"
    assert found.total("triptych_requests_total", route=route, outcome="2xx", application="triptych") >= 2
    assert found.total("triptych_requests_total", route=route, status="400") >= 1
    assert found.total("triptych_stage_requests_total", stage="vae", outcome="ok") >= 2
    begun = {name for name, metric in METRICS.items() if name in found.kinds and metric.kind == "counter"}
    assert {"triptych_recoveries_total", "triptych_given_up_total", "triptych_resumes_total"} <= begun
