"""Stage timings: what is measured, what file and log hold, and that nothing happens when switched off."""

import json
import os
import time
from multiprocessing import get_context

import pytest

from deployments.observability.observer import Observers
from deployments.observability.stage_timing import StageTimer, make_stage_timer, read_requests
from deployments.observability.table import OBSERVERS
from tests.support.observing import replica_with, work_on


def timer(tmp_path, synchronize=lambda: None, replica="denoiser#1"):
    environ = {"SGLANG_DIFFUSION_STAGE_LOGGING": "true", "SGLANG_DIFFUSION_CACHE_ROOT": str(tmp_path)}
    return make_stage_timer(replica_with(environ, replica, synchronize))


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "logs" / "performance.jsonl").read_text().splitlines()]


def test_a_stage_writes_one_json_line_and_one_log_line_a_request(tmp_path, caplog):
    caplog.set_level("INFO")
    timings = timer(tmp_path)
    for request in ("r1", "r2"):
        now = time.time()
        work = work_on(request, "denoiser", arrived=now - 0.5, sent=now - 0.75, bytes_in=100)
        with timings.around(work):
            work.steps, work.bytes_out = 4, 200
    first, second = read(tmp_path)
    assert (first["request_id"], second["request_id"]) == ("r1", "r2")
    expected = {
        "stage": "denoiser",
        "replica": "denoiser#1",
        "process_id": os.getpid(),
        "steps": 4,
        "bytes_in": 100,
        "bytes_out": 200,
        "outcome": "ok",
    }
    assert first.items() >= expected.items()
    assert first["queue_s"] == pytest.approx(0.5, abs=0.2)
    assert first["transfer_s"] == pytest.approx(0.25)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for part in (
        "request_id=r1",
        "stage=denoiser",
        "transfer_s=0.250000",
        "steps=4",
        "bytes_out=200",
        "outcome=ok",
    ):
        assert part in lines[0].split()


def test_work_that_the_device_has_not_finished_counts_for_the_stage_that_gave_it(tmp_path):
    left_to_do = [0.03]  # seconds of work that an earlier stage left on the device

    def synchronize():
        time.sleep(left_to_do.pop() if left_to_do else 0)

    with timer(tmp_path, synchronize=synchronize).around(work_on("r", "vae")):
        left_to_do.append(0.2)  # queued, not done
    (timing,) = read(tmp_path)
    assert timing["compute_s"] >= 0.2
    assert not left_to_do


def test_a_stage_that_fails_is_recorded_with_its_error_and_the_error_goes_on(tmp_path):
    with pytest.raises(MemoryError), timer(tmp_path).around(work_on("r", "vae")):
        raise MemoryError
    (timing,) = read(tmp_path)
    assert timing["outcome"] == "MemoryError"


def test_switched_off_nothing_is_written_and_the_device_is_not_waited_for(tmp_path, caplog):
    caplog.set_level("INFO")
    variables = {"SGLANG_DIFFUSION_STAGE_LOGGING": "false", "SGLANG_DIFFUSION_CACHE_ROOT": str(tmp_path)}
    replica = replica_with(variables, synchronize=lambda: pytest.fail("synchronised"))
    assert make_stage_timer(replica) is None
    with Observers(replica, OBSERVERS).around(work_on("r", "vae")):
        pass
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_the_stages_of_a_request_are_read_as_one_record(tmp_path):
    for stage, seconds in (("encoder", 1.0), ("denoiser", 2.0)):
        with timer(tmp_path).around(work_on("r1", stage, arrived=time.time() - seconds)):
            pass
        with timer(tmp_path).around(work_on("r2", stage)):
            pass
    first, second = read_requests(tmp_path / "logs" / "performance.jsonl")
    assert first["request_id"] == "r1"
    assert [stage["stage"] for stage in first["stages"]] == ["encoder", "denoiser"]
    assert first["total_s"] == pytest.approx(sum(stage["queue_s"] + stage["compute_s"] for stage in first["stages"]))
    assert first["total_s"] > 3.0
    assert second["request_id"] == "r2"


def test_lines_of_several_processes_stay_whole(tmp_path):
    def write_lines(name):
        timings = StageTimer(tmp_path / "logs" / "performance.jsonl", name, lambda: None)
        for number in range(60):
            with timings.around(work_on(f"{name}-{number}", "vae")):
                pass

    processes = [get_context("fork").Process(target=write_lines, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert {timing["request_id"] for timing in read(tmp_path)} == {f"{n}-{i}" for n in "ab" for i in range(60)}


def test_the_latest_timings_of_a_request_are_remembered_until_they_are_forgotten(tmp_path):
    timings = timer(tmp_path)
    for request, stage in (("r1", "encoder"), ("r2", "encoder"), ("r1", "vae")):
        with timings.around(work_on(request, stage)):
            pass
    assert [record["stage"] for record in timings.recall("r1")] == ["encoder", "vae"]
    timings.forget()
    assert timings.recall("r1") == []
