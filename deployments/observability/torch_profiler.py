"""Writes traces of torch's profiler: one a stage and request, or a window over all that a process does."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from deployments.messages import StageName
from deployments.observability.observer import Observer, StageWork
from env_config.variables import Runtime

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_DIFFUSION_TORCH_PROFILER_DIR"
MAX_STEPS = 5  # of a trace, so that it stays readable and is written in a second or two
MAX_WINDOW_S = 60.0

# Two profilers at once crash the process (torch 2.13).
one_profiler = threading.Lock()


class ProfilerBusyError(RuntimeError):
    """Another trace is being taken in this process."""


class StepCounter:
    """Told of each step, it ends the trace at the last step of its window."""

    def __init__(self, max_steps: int, trace: RunningTrace | None) -> None:
        self._steps_left = max_steps
        self._trace = trace

    def step(self) -> None:
        self._steps_left -= 1
        if self._steps_left == 0 and self._trace:
            self._trace.stop()


class TorchProfiler(Observer):
    """Traces the requests of a process if the variable names a directory; otherwise does nothing."""

    def __init__(self, runtime: Runtime, replica: str, max_steps: int = MAX_STEPS) -> None:
        """Raises ValueError if the directory cannot be made."""
        self.directory = runtime.torch_profiler_dir
        self._replica = replica
        self._max_steps = max_steps
        self._window: ProfilerWindow | None = None
        if self.directory:
            make_directory(self.directory)

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        """A denoiser's forwards run in the thread of its engine, so all threads are traced there."""
        with self.trace(work.request.request_id, work.stage, all_threads=work.stage == "denoiser") as counter:
            work.on_step.append(counter.step)
            yield

    @contextmanager
    def trace(self, request_id: str, stage: StageName, all_threads: bool = False) -> Iterator[StepCounter]:
        """Profile the calling thread, or with `all_threads` the process, until the end or `max_steps` steps.

        A process takes one trace at a time. A request that comes meanwhile runs unprofiled; the log names it.
        """
        if not self.directory:
            yield StepCounter(self._max_steps, None)
            return
        if not one_profiler.acquire(blocking=False):
            logger.info("%s of request %s runs unprofiled: another trace is being taken", stage, request_id)
            yield StepCounter(self._max_steps, None)
            return
        try:
            labels = {"request_id": request_id, "stage": stage, "replica": self._replica}
            trace = RunningTrace(self.directory, labels, all_threads)
            try:
                yield StepCounter(self._max_steps, trace)
            finally:
                trace.stop()
                trace.export()
        finally:
            one_profiler.release()

    def start_window(self, directory: Path | None = None, max_s: float = MAX_WINDOW_S) -> Path:
        """Profile all threads until `stop_window` or for `max_s` seconds; answers the file to be written.

        `directory` is used where the variable names none. Raises ProfilerBusyError during another trace,
        ValueError if no directory is known.
        """
        directory = self.directory or directory
        if directory is None:
            raise ValueError(f"a directory is needed, or {VARIABLE} must be set")
        make_directory(directory)
        if not one_profiler.acquire(blocking=False):
            raise ProfilerBusyError("another trace is being taken in this process")
        self._window = ProfilerWindow(directory, self._replica, max_s)
        return self._window.wait_for_start()

    def stop_window(self) -> Path:
        """Ends the window and answers its file, which is complete; raises ValueError if none was started."""
        window, self._window = self._window, None
        if window is None:
            raise ValueError("no profiler window was started")
        return window.stop()


class ProfilerWindow:
    """Starts and stops a profiler in one thread of its own, as torch wants it."""

    def __init__(self, directory: Path, replica: str, max_s: float) -> None:
        labels = {"request_id": "window", "stage": "all", "replica": replica}
        self._file: Future[Path] = Future()
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(directory, labels, max_s), daemon=True)
        self._thread.start()

    def _run(self, directory: Path, labels: Mapping[str, str], max_s: float) -> None:
        try:
            trace = RunningTrace(directory, labels, all_threads=True)
            self._file.set_result(trace.file)
            self._stop_asked.wait(max_s)
            trace.stop()
            trace.export()
        except BaseException as error:  # goes on in the thread that waits for the file
            if self._file.done():
                raise
            self._file.set_exception(error)
        finally:
            one_profiler.release()

    def wait_for_start(self) -> Path:
        return self._file.result()

    def stop(self) -> Path:
        self._stop_asked.set()
        self._thread.join()
        return self._file.result()


class RunningTrace:
    """A profiler that runs from construction to `stop`.

    torch wants both in one thread: that of the caller, or for a trace of all threads one of its own, so that
    `stop` may be called in any.
    """

    def __init__(self, directory: Path, labels: Mapping[str, str], all_threads: bool) -> None:
        self.file = directory / file_name(labels)
        self._own_thread = ThreadPoolExecutor(1, thread_name_prefix="profiler") if all_threads else None
        self._thread = threading.get_ident()
        self._is_running = True
        self._profile = profile(
            activities=torch.profiler.supported_activities(),
            record_shapes=True,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads),
        )
        if self._own_thread:
            self._own_thread.submit(self._profile.start).result()
        else:
            self._profile.start()
        for name, text in {**labels, "process_id": str(os.getpid())}.items():
            self._profile.add_metadata_json(name, json.dumps(text))

    def stop(self) -> None:
        """Nobody waits for the end of a trace of all threads: the step that ends it goes on."""
        if not self._is_running:
            return
        self._is_running = False
        if self._own_thread:
            self._own_thread.submit(self._profile.stop)
            self._own_thread.shutdown(wait=False)
        else:
            assert threading.get_ident() == self._thread, "a trace ends in the thread that began it"
            self._profile.stop()

    def export(self) -> None:
        """Puts the file in place whole, after `stop`. A full disk costs the trace, not the request."""
        if self._own_thread:
            self._own_thread.shutdown(wait=True)
        partial = self.file.with_name(f"partial-{self.file.name}")
        try:
            self._profile.export_chrome_trace(str(partial))
            partial.replace(self.file)
        except (OSError, RuntimeError) as error:
            logger.error("the trace %s cannot be written: %s", self.file, error)
        else:
            logger.info("wrote the trace %s", self.file)


def file_name(labels: Mapping[str, str]) -> str:
    """Ends as TensorBoard's plug-in wants it; Perfetto and chrome://tracing read it too."""
    parts = [labels["replica"], str(os.getpid()), labels["request_id"], labels["stage"]]
    name = "-".join(re.sub(r"[^\w.-]", "_", part) for part in parts)
    return f"{name}.{time.time_ns()}.pt.trace.json.gz"


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{VARIABLE}={directory} cannot be made: {error.strerror}") from error
