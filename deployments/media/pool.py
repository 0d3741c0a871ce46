"""A few processes that write media files, so that encoding a picture or video does not hold up the VAE stage.

`fork` copies the replica as it is: it is safe only before the accelerator is initialised and before threads
of libraries hold locks. So the pool is the first thing that a replica makes, and each worker proves itself
by writing a file before the constructor returns. A worker that replaces a dead one is always spawned, since
by then the replica has threads, weights and a device.

What is to be written goes to a worker through shared memory: as much at a time as there are workers.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
import psutil

from deployments.errors import GenerationFailedError
from deployments.media.files import FileToWrite, write_file
from deployments.media.shared_memory import Shared, in_shared_memory, receive, send
from deployments.messages import MediaFile

logger = logging.getLogger(__name__)

StartMethod = Literal["fork", "spawn"]
VARIABLE = "SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD"
START_TIMEOUT_S = 120.0
WATCH_S = 1.0  # between two looks at the workers
STALLED_S = 30.0  # a worker that was not seen to compute for so long is stopped, or waits for ever
MAX_DEATHS = 3  # a file whose workers died this often is given up
STANDARD_STREAMS = 3  # file descriptors below it
LEAST_WORKERS, MOST_WORKERS = 2, 16  # two at least, so that no picture waits for a video


class MediaWorkerError(RuntimeError):
    """A worker could not be started."""


@dataclass(frozen=True)
class Workers:
    """How many processes write files now or could, and how many have died over one since the start."""

    idle: int
    busy: int
    deaths: int


def workers_for(num_cpus: float) -> int:
    """One for each processor that the replica was given. Each has as many threads as its file's bytes depend on."""
    return min(MOST_WORKERS, max(LEAST_WORKERS, int(num_cpus)))


class MediaPool:
    """Writes files in processes of its own, at most `num_workers` at a time.

    `method` is how the first workers are started. They end when `close` is called or the replica ends. A worker that
    is stopped, hangs, or takes longer than `file_timeout_s` for a file is killed, and is then one that died.
    """

    def __init__(self, method: StartMethod, num_workers: int = 2, file_timeout_s: float | None = None) -> None:
        """Raises MediaWorkerError when a worker does not write its first file within START_TIMEOUT_S."""
        self.method = method
        self._file_timeout_s = file_timeout_s
        self._closed = threading.Event()
        self._deaths = 0
        self._workers = [_Worker(method) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            worker.check()
            self._idle.put(worker)
        threading.Thread(target=self._watch, name="media-watch", daemon=True).start()

    def write(self, file: FileToWrite) -> MediaFile:
        """The file as `media_files.write_file` writes it; waits for a free worker.

        The work of a worker that dies is done again by its successor. Raises GenerationFailedError where
        `write_file` raises, and after MAX_DEATHS deaths; MediaWorkerError where a successor cannot be started.
        """
        worker = self._idle.get()
        try:
            with in_shared_memory(file) as shared:
                for _ in range(MAX_DEATHS):
                    try:
                        return worker.write(shared)
                    except (EOFError, OSError):
                        how = worker.why_killed or "died"
                        logger.warning("the media worker %d %s, another takes its place", worker.process_id, how)
                        worker = self._replace(worker)
        finally:
            self._idle.put(worker)
        raise GenerationFailedError(
            f"the processes that wrote the {file.format} file died {MAX_DEATHS} times in a row; the last {how}"
        )

    def workers(self) -> Workers:
        """At this moment."""
        idle = self._idle.qsize()
        return Workers(idle, len(self._workers) - idle, self._deaths)

    def describe(self) -> dict[str, Any]:
        """How the pool was started and the processes it has now."""
        return {"method": self.method, "process_ids": self.process_ids, "idle": self._idle.qsize()}

    @property
    def process_ids(self) -> list[int]:
        return [worker.process_id for worker in self._workers]

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.close()

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_S):
            for worker in tuple(self._workers):
                worker.kill_if_stuck(self._file_timeout_s)

    def _replace(self, dead: _Worker) -> _Worker:
        self._deaths += 1
        dead.close()
        worker = _Worker("spawn")
        worker.check()
        self._workers[self._workers.index(dead)] = worker
        return worker


class _Worker:
    """One process and the pipe to it; used by one thread at a time."""

    def __init__(self, method: StartMethod) -> None:
        context: Any = multiprocessing.get_context(method)  # typed without its Process
        self.method = method
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="media", daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        assert self._process.pid is not None
        self.process_id = self._process.pid
        self.why_killed = ""
        self._watched = _Watched(self.process_id)

    def check(self) -> None:
        try:
            with in_shared_memory(FileToWrite("png", [np.zeros((1, 1, 3), np.uint8)], {})) as smallest:
                send(self._connection, smallest)
            if not wait([self._connection, self._process.sentinel], START_TIMEOUT_S):
                raise TimeoutError(f"it did not answer within {START_TIMEOUT_S:g} s")
            self._receive()
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            self.close()
            raise MediaWorkerError(
                f"{VARIABLE}={self.method}: a media worker cannot be started: {error or 'it ended at once'}"
            ) from error

    def write(self, file: Shared) -> MediaFile:
        """Raises EOFError or OSError when the process is gone, GenerationFailedError when it lives but could not."""
        self._watched.begin()
        try:
            send(self._connection, file)  # may wait for a worker that does not read
            wait([self._connection, self._process.sentinel])
            return self._receive()
        finally:
            self._watched.end()

    def kill_if_stuck(self, file_timeout_s: float | None) -> None:
        """Called by another thread: `write` then sees the process die."""
        reason = self._watched.why_stuck(file_timeout_s)
        if reason and not self.why_killed:
            self.why_killed = reason
            self._process.kill()

    def _receive(self) -> MediaFile:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise GenerationFailedError(f"the file cannot be written: {answer}")
        assert isinstance(answer, MediaFile)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


class _Watched:
    """Whether a worker gets on with the file that it writes: by the clock, and by the time that it computes."""

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self._began: float | None = None  # time.monotonic(); None: it writes nothing
        self._computed_s, self._computed_at = 0.0, 0.0  # seconds of its processor, and when they were seen to grow

    def begin(self) -> None:
        self._computed_s, self._computed_at = -1.0, time.monotonic()
        self._began = self._computed_at

    def end(self) -> None:
        self._began = None

    def why_stuck(self, file_timeout_s: float | None) -> str:
        """Empty while it is not."""
        began, now = self._began, time.monotonic()
        if began is None:
            return ""
        if file_timeout_s is not None and now - began > file_timeout_s:
            return f"had not written its file within {file_timeout_s:g} s"
        with contextlib.suppress(psutil.Error):  # gone meanwhile: `write` sees it
            process = psutil.Process(self._process_id)
            if process.status() == psutil.STATUS_STOPPED:
                return "was stopped"
            times = process.cpu_times()
            if times.user + times.system > self._computed_s:
                self._computed_s, self._computed_at = times.user + times.system, now
        return f"stood still for {STALLED_S:g} s" if now - self._computed_at > STALLED_S else ""


def _serve(connection: Connection) -> None:
    """The worker's life: it ends with the process that started it, even one that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    _leave_the_replica(keep=(connection.fileno(), int(parent.sentinel)))
    with contextlib.suppress(EOFError, OSError):
        while connection in wait([connection, parent.sentinel]):
            connection.send(_answer(receive(connection)))
    os._exit(0)  # a forked process must not run what the replica had planned for its own end


def _answer(file: FileToWrite) -> MediaFile | str:
    try:
        return write_file(file)
    except Exception as error:  # noqa: BLE001  (goes to the replica, which raises it)
        return f"{type(error).__name__}: {error}"


def _leave_the_replica(keep: tuple[int, ...]) -> None:
    """Let go of what a fork shares: signal handlers, and sockets that would hide the replica's death from Ray."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lowest = STANDARD_STREAMS
    for descriptor in sorted(keep):
        os.closerange(lowest, descriptor)
        lowest = descriptor + 1
    os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))
