"""A replica's threads: one work at a time on the pipeline, observed from the arrival of a request to its end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deployments.messages import UNFOLLOWED, Conditioning, DecodeInputs, GenerationRequest, OutputFormat, Packed
from deployments.observability.observer import Observers
from deployments.observability.stage_load import StageLoads
from deployments.observability.stage_timing import StageTimer
from deployments.observability.table import OBSERVERS
from deployments.replicas.threads import StageThreads
from tests.support.observing import replica_with

PIPELINE: Any = object()
CONDITIONING = Conditioning(Packed(None, (np.zeros(12, np.uint8),)), made_at=time.time())


def request(name: str) -> GenerationRequest:
    return GenerationRequest(name, "tiny", {}, 0, OutputFormat("image", "png"))


@pytest.fixture
def observers(tmp_path: Any) -> Observers:
    variables = {"SGLANG_DIFFUSION_STAGE_LOGGING": "1", "SGLANG_DIFFUSION_CACHE_ROOT": str(tmp_path)}
    return Observers(replica_with(variables), OBSERVERS)


@pytest.fixture
def threads(observers: Observers) -> Iterator[StageThreads]:
    threads = StageThreads(observers)
    yield threads
    threads.close()


async def test_the_pipeline_has_one_thread_and_the_event_loop_stays_free(threads: StageThreads) -> None:
    may_end, names = threading.Event(), []

    def work(pipeline: Any, request: GenerationRequest) -> str:
        assert pipeline is PIPELINE
        names.append(threading.current_thread().name)
        assert may_end.wait(30)
        return request.request_id

    both = [asyncio.create_task(threads.run(PIPELINE, "vae", request(name), UNFOLLOWED, work)) for name in "ab"]
    await asyncio.sleep(0.05)
    assert len(names) == 1, "the second waits for its turn"
    may_end.set()
    assert await asyncio.gather(*both) == ["a", "b"]
    assert len(set(names)) == 1


async def test_a_request_is_present_from_its_arrival_and_in_work_from_its_turn(
    threads: StageThreads, observers: Observers
) -> None:
    may_end = threading.Event()
    both = [
        asyncio.create_task(threads.run(PIPELINE, "vae", request(name), UNFOLLOWED, lambda *_: may_end.wait(30)))
        for name in "ab"
    ]
    await asyncio.sleep(0.05)
    states = {each["request_id"]: each["state"] for each in observers.describe()["requests"]}
    assert states == {"a": "running", "b": "waiting"}
    assert observers.find(StageLoads).loads()["vae"].present == 2
    may_end.set()
    await asyncio.gather(*both)
    assert observers.describe()["requests"] == []
    assert observers.find(StageLoads).loads()["vae"].present == 0


async def test_bytes_and_seconds_of_the_work_are_timed(threads: StageThreads, observers: Observers) -> None:
    answer = DecodeInputs("result", Packed(None, (np.zeros(5, np.uint8),)))
    await threads.run(PIPELINE, "vae", request("r"), UNFOLLOWED, lambda *_: answer, CONDITIONING)
    [timing] = observers.find(StageTimer).recall("r")
    assert (timing["bytes_in"], timing["bytes_out"], timing["outcome"]) == (12, 5, "ok")
    assert timing["transfer_s"] > 0


def test_a_denoising_tells_its_steps_to_whoever_observes(threads: StageThreads, observers: Observers) -> None:
    with threads.observed_denoising(request("r"), UNFOLLOWED, time.time(), CONDITIONING) as work:
        assert observers.find(StageLoads).loads()["denoiser"].present == 1
        work.step()
        work.steps, work.bytes_out = 4, 3
    [timing] = observers.find(StageTimer).recall("r")
    assert (timing["stage"], timing["steps"], timing["bytes_in"], timing["bytes_out"]) == ("denoiser", 4, 12, 3)
