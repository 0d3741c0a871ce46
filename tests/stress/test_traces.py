"""One trace through real replicas, and on through the death of a denoiser and of an ingress, as a collector gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.otlp_collector import Collector, ReceivedSpan, collecting
from tests.support.served_application import ServedApplication, launched_application
from tests.support.tiny_models import checkpoint
from tests.support.video_jobs import PROMPT, WAIT_S, wait_for_end, wait_for_progress

pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("default")]

ROUTE = "/v1/images/generations"
TREE = f"""\
POST {ROUTE}
  read
  make
    encode
      encoder
    denoise
      denoiser
    decode
      vae
      write
  store"""
ARRIVES_S = 60  # from the end of a span until the collector has it
PARENT = "00f067aa0ba902b7"


def test_a_request_is_one_trace_whatever_dies(
    checkpoints_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        for name, value in {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_SERVICE_NAME": "tried",
        }.items():
            monkeypatch.setenv(name, value)
        with (
            launched_application(checkpoint("flux", checkpoints_root), tmp_path) as served,
            httpx.Client(base_url=served.url, timeout=WAIT_S) as http,
        ):
            check_the_tree(http, collector)
            check_a_killed_denoiser(served, http, collector)
            check_a_killed_ingress(served, http, collector)


def check_the_tree(http: httpx.Client, collector: Collector) -> None:
    trace = "1" * 32
    answer = http.post(ROUTE, json={"prompt": PROMPT, "response_format": "url"}, headers=of_trace(trace))
    assert answer.status_code == 200, answer.text
    wait_for(collector, trace, f"POST {ROUTE}")
    collector.wait_for(trace, lambda spans: len(spans) == len(TREE.splitlines()), ARRIVES_S)
    assert collector.tree(trace) == TREE
    spans = {span.name: span for span in collector.of(trace)}
    assert spans[f"POST {ROUTE}"].parent == PARENT
    assert {span.service for span in spans.values()} == {"tried"}
    assert len({span.instance for span in spans.values()}) == 4, "the ingress and three replicas"
    assert spans["denoiser"].attributes["steps"] == 4
    assert not any(span.has_failed for span in spans.values())


def check_a_killed_denoiser(served: ServedApplication, http: httpx.Client, collector: Collector) -> None:
    trace = "2" * 32
    job_id = create(http, trace)
    wait_for_progress(http, [job_id])
    served.process_of("Denoiser").kill()
    assert wait_for_end(http, job_id)["status"] == "completed"
    wait_for(collector, trace, "job")
    died, again = calls = [span for span in collector.of(trace) if span.name == "denoise"]
    assert died.has_failed
    assert not again.has_failed
    assert [span.attributes["attempt"] for span in calls] == [1, 2]
    [make] = [span for span in collector.of(trace) if span.name == "make"]
    assert {span.parent for span in calls} == {make.id}
    assert "replica lost" in make.events
    collector.wait_for(trace, lambda spans: any(span.parent == again.id for span in spans), ARRIVES_S)
    [denoiser] = [span for span in collector.of(trace) if span.parent == again.id]
    assert denoiser.attributes["first_step"] == again.attributes["first_step"] > 0
    assert "resumed" in denoiser.events
    served.wait_until_healthy()


def check_a_killed_ingress(served: ServedApplication, http: httpx.Client, collector: Collector) -> None:
    trace = "3" * 32
    job_id = create(http, trace)
    wait_for_progress(http, [job_id])
    served.process_of("Ingress").kill()
    served.wait_until_healthy()
    assert wait_for_end(http, job_id)["status"] == "completed"
    wait_for(collector, trace, "job")
    [job] = [span for span in collector.of(trace) if span.name == "job"]  # the other one died with its process
    assert (job.attributes["attempt"], job.attributes["taken_over"]) == (2, True)
    [request] = [span for span in collector.of(trace) if span.name.startswith("POST")]
    assert job.parent == request.id


def create(http: httpx.Client, trace: str) -> str:
    body: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 150, "background": True, "seed": int(trace[0])}
    answer = http.post(ROUTE, json=body, headers=of_trace(trace))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def of_trace(trace: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{PARENT}-01"}


def wait_for(collector: Collector, trace: str, name: str) -> None:
    def is_there(spans: list[ReceivedSpan]) -> bool:
        return any(span.name == name for span in spans)

    collector.wait_for(trace, is_there, ARRIVES_S)
