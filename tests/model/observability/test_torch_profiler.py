"""Profiler traces: one a stage and request, bounded, one at a time in a process, whole on disk."""

import gzip
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deployments.observability.torch_profiler import ProfilerBusyError, TorchProfiler
from env_config.variables import EnvConfig
from tests.support.observing import work_on


def profiler(directory, replica="replica", **options) -> TorchProfiler:
    environ = {"SGLANG_DIFFUSION_TORCH_PROFILER_DIR": str(directory)} if directory else {}
    return TorchProfiler(EnvConfig.from_environ(environ).runtime, replica, **options)


def work(name: str) -> None:
    with torch.profiler.record_function(name):
        torch.ones(8, 8) @ torch.ones(8, 8)


def read(file) -> dict:
    with gzip.open(file) as stream:
        return json.load(stream)


def names(trace: dict) -> list[str]:
    return [event.get("name") for event in trace["traceEvents"]]


def test_a_trace_is_named_and_labelled_by_request_stage_replica_and_process(tmp_path):
    with profiler(tmp_path / "traces", "app#denoiser#x1").trace("img/1", "denoiser"):
        work("a step")
    (file,) = (tmp_path / "traces").iterdir()
    name = rf"app_denoiser_x1-{os.getpid()}-img_1-denoiser\.\d+\.pt\.trace\.json\.gz"
    assert re.fullmatch(name, file.name)
    trace = read(file)
    labels = {key: trace[key] for key in ("request_id", "stage", "replica", "process_id")}
    assert labels == {
        "request_id": "img/1",
        "stage": "denoiser",
        "replica": "app#denoiser#x1",
        "process_id": str(os.getpid()),
    }
    assert "a step" in names(trace)
    assert "aten::mm" in names(trace)


def test_each_stage_and_request_has_its_own_trace(tmp_path):
    traces = profiler(tmp_path)
    for request in ("r1", "r2"):
        for stage in ("encoder", "vae"):
            with traces.trace(request, stage):
                work(f"{request} {stage}")
    read_traces = [read(file) for file in tmp_path.iterdir()]
    assert {(t["request_id"], t["stage"]) for t in read_traces} == {
        (request, stage) for request in ("r1", "r2") for stage in ("encoder", "vae")
    }
    for trace in read_traces:
        mine = f"{trace['request_id']} {trace['stage']}"
        assert [name for name in names(trace) if re.match(r"r\d ", name or "")] == [mine]


def test_a_trace_ends_after_the_steps_of_its_window(tmp_path):
    with profiler(tmp_path, max_steps=2).trace("r", "denoiser") as counter:
        for number in range(5):
            work(f"step {number}")
            counter.step()
    (file,) = tmp_path.iterdir()
    steps = [name for name in names(read(file)) if (name or "").startswith("step ")]
    assert steps == ["step 0", "step 1"]


def test_a_request_that_comes_during_a_trace_runs_unprofiled_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    traces, both_run = profiler(tmp_path), threading.Barrier(2, timeout=30)

    def run(request: str) -> str:
        with traces.trace(request, "vae") as counter:
            both_run.wait()  # in both requests at once, where a second profiler would crash the process
            work(request)
            counter.step()
            both_run.wait()
        return request

    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(run, ["r1", "r2"])) == {"r1", "r2"}
    (file,) = tmp_path.iterdir()
    profiled = read(file)["request_id"]
    (other,) = {"r1", "r2"} - {profiled}
    assert f"vae of request {other} runs unprofiled: another trace is being taken" in caplog.text
    with traces.trace("r3", "vae"):
        work("later")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_request_that_fails_leaves_its_trace_and_the_profiler_free(tmp_path):
    traces = profiler(tmp_path)
    with pytest.raises(ZeroDivisionError), traces.trace("r1", "vae"):
        1 / 0  # noqa: B018
    with traces.trace("r2", "vae"):
        work("next")
    assert {read(file)["request_id"] for file in tmp_path.iterdir()} == {"r1", "r2"}


def test_the_work_of_an_engines_thread_is_traced_when_all_threads_are_asked_for(tmp_path):
    with ThreadPoolExecutor(1) as engine:
        engine.submit(work, "warm-up").result()
        for all_threads in (False, True):
            with profiler(tmp_path).trace(str(all_threads), "denoiser", all_threads=all_threads):
                engine.submit(work, "in the engine").result()
    seen = {read(file)["request_id"]: "in the engine" in names(read(file)) for file in tmp_path.iterdir()}
    assert seen == {"False": False, "True": True}


def test_a_trace_of_all_threads_is_ended_by_the_steps_of_the_engines_thread(tmp_path):
    def step(counter, number):
        work(f"step {number}")
        counter.step()
        time.sleep(0.2)  # the end of a trace is not waited for

    with ThreadPoolExecutor(1) as engine:
        engine.submit(work, "warm-up").result()
        with profiler(tmp_path, max_steps=2).trace("r", "denoiser", all_threads=True) as counter:
            for number in range(5):
                engine.submit(step, counter, number).result()
    (file,) = tmp_path.iterdir()
    steps = [name for name in names(read(file)) if (name or "").startswith("step ")]
    assert steps[:2] == ["step 0", "step 1"]
    assert "step 4" not in steps


def test_as_an_observer_it_traces_a_stages_work_and_is_told_of_its_steps(tmp_path):
    observed = work_on("r", "vae")
    with profiler(tmp_path, max_steps=1).around(observed):
        work("first")
        observed.step()
        work("second")
    (file,) = tmp_path.iterdir()
    trace = read(file)
    assert (trace["request_id"], trace["stage"], trace["replica"]) == ("r", "vae", "replica")
    assert [name for name in names(trace) if name in ("first", "second")] == ["first"]


def test_without_the_variable_nothing_is_profiled(tmp_path):
    traces = profiler(None)
    with traces.trace("r", "vae") as counter:
        assert not torch.autograd.profiler._is_profiler_enabled
        counter.step()
    with pytest.raises(ValueError, match="SGLANG_DIFFUSION_TORCH_PROFILER_DIR"):
        traces.start_window()


def test_a_directory_that_cannot_be_made_is_refused_with_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"SGLANG_DIFFUSION_TORCH_PROFILER_DIR=.*file/traces cannot be made"):
        profiler(tmp_path / "file" / "traces")


def test_a_trace_that_cannot_be_written_costs_the_trace_and_not_the_request(tmp_path, caplog):
    traces = profiler(tmp_path / "traces")
    with traces.trace("r", "vae"):
        (tmp_path / "traces").rmdir()
        (tmp_path / "traces").write_text("in the way")
    assert "cannot be written" in caplog.text


def test_a_window_records_the_threads_of_the_process_until_it_is_stopped(tmp_path):
    traces = profiler(None)
    with ThreadPoolExecutor(1) as engine:
        engine.submit(work, "before").result()
        file = traces.start_window(tmp_path / "window")
        engine.submit(work, "inside").result()
        with pytest.raises(ProfilerBusyError):
            traces.start_window(tmp_path / "window")
        assert traces.stop_window() == file
        engine.submit(work, "after").result()
    trace = read(file)
    assert [name for name in names(trace) if name in ("before", "inside", "after")] == ["inside"]
    assert trace["replica"] == "replica"
    with pytest.raises(ValueError, match="no profiler window was started"):
        traces.stop_window()


def test_a_window_ends_by_itself(tmp_path):
    traces = profiler(tmp_path)
    file = traces.start_window(max_s=0.05)
    for _ in range(1000):
        if file.exists():
            break
        threading.Event().wait(0.02)
    assert read(file)["stage"] == "all"
    assert traces.stop_window() == file
