"""Stage timings: what is measured, what file and log hold, and that nothing happens when switched off."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.observability.stage_timing import NoStageTimer, read_requests, stage_timer
from env_config.variables import EnvConfig

ROOT = Path(__file__).parents[3]


def timer(tmp_path, on="true", synchronize=lambda: None, replica="denoiser#1"):
    environ = {"SGLANG_DIFFUSION_STAGE_LOGGING": on, "SGLANG_DIFFUSION_CACHE_ROOT": str(tmp_path)}
    return stage_timer(EnvConfig.from_environ(environ).runtime, replica, synchronize)


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "logs" / "performance.jsonl").read_text().splitlines()]


def test_a_stage_writes_one_json_line_and_one_log_line_a_request(tmp_path, caplog):
    caplog.set_level("INFO")
    timings = timer(tmp_path)
    for request in ("r1", "r2"):
        with timings.measure(request, "denoiser") as timing:
            timing.steps, timing.bytes_in, timing.bytes_out = 4, 100, 200
            timing.queue_s, timing.transfer_s = 0.5, 0.25
    first, second = read(tmp_path)
    assert (first["request_id"], second["request_id"]) == ("r1", "r2")
    expected = {
        "stage": "denoiser",
        "replica": "denoiser#1",
        "process_id": os.getpid(),
        "queue_s": 0.5,
        "transfer_s": 0.25,
        "steps": 4,
        "bytes_in": 100,
        "bytes_out": 200,
        "outcome": "ok",
    }
    assert first.items() >= expected.items()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for part in (
        "request_id=r1",
        "stage=denoiser",
        "queue_s=0.500000",
        "steps=4",
        "bytes_out=200",
        "outcome=ok",
    ):
        assert part in lines[0].split()


def test_work_that_the_device_has_not_finished_counts_for_the_stage_that_gave_it(tmp_path):
    left_to_do = [0.03]  # seconds of work that an earlier stage left on the device

    def synchronize():
        time.sleep(left_to_do.pop() if left_to_do else 0)

    with timer(tmp_path, synchronize=synchronize).measure("r", "vae"):
        left_to_do.append(0.2)  # queued, not done
    (timing,) = read(tmp_path)
    assert timing["compute_s"] >= 0.2
    assert not left_to_do


def test_a_stage_that_fails_is_recorded_with_its_error_and_the_error_goes_on(tmp_path):
    with pytest.raises(MemoryError), timer(tmp_path).measure("r", "vae"):
        raise MemoryError
    (timing,) = read(tmp_path)
    assert timing["outcome"] == "MemoryError"


def test_switched_off_nothing_is_written_and_the_device_is_not_waited_for(tmp_path, caplog):
    caplog.set_level("INFO")
    timings = timer(tmp_path, on="false", synchronize=lambda: pytest.fail("synchronised"))
    with timings.measure("r", "vae") as timing:
        timing.steps = 3
    assert isinstance(timings, NoStageTimer)
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_the_stages_of_a_request_are_read_as_one_record(tmp_path):
    for stage, seconds in (("encoder", 1.0), ("denoiser", 2.0)):
        with timer(tmp_path).measure("r1", stage) as timing:
            timing.queue_s = seconds
        with timer(tmp_path).measure("r2", stage):
            pass
    first, second = read_requests(tmp_path / "logs" / "performance.jsonl")
    assert first["request_id"] == "r1"
    assert [stage["stage"] for stage in first["stages"]] == ["encoder", "denoiser"]
    assert first["total_s"] == pytest.approx(3.0 + sum(stage["compute_s"] for stage in first["stages"]))
    assert second["request_id"] == "r2"


def test_lines_of_several_processes_stay_whole(tmp_path):
    program = """if True:
        import sys
        from pathlib import Path
        from deployments.observability.stage_timing import StageTimer
        timer = StageTimer(Path(sys.argv[1]) / "logs" / "performance.jsonl", sys.argv[2], lambda: None)
        for number in range(200):
            with timer.measure(f"{sys.argv[2]}-{number}", "vae"):
                pass
    """
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert {timing["request_id"] for timing in read(tmp_path)} == {f"{n}-{i}" for n in "ab" for i in range(200)}
