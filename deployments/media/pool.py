"""A few processes that write media files, so that encoding a picture or video does not hold up the VAE stage.

`fork` copies the replica as it is: it is safe only before the accelerator is initialised and before threads
of libraries hold locks. So the pool is the first thing that a replica makes, and each worker proves itself
by writing a file before the constructor returns. A worker that replaces a dead one is always spawned, since
by then the replica has threads, weights and a device.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np

from deployments.errors import GenerationFailedError
from deployments.media.files import FileToWrite, write_file
from deployments.messages import MediaFile

logger = logging.getLogger(__name__)

StartMethod = Literal["fork", "spawn"]
VARIABLE = "SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD"
START_TIMEOUT_S = 120.0
MAX_DEATHS = 2  # a file whose workers died this often is given up
STANDARD_STREAMS = 3  # file descriptors below it


class MediaWorkerError(RuntimeError):
    """A worker could not be started."""


class MediaPool:
    """Writes files in processes of its own, at most `num_workers` at a time.

    `method` is how the first workers are started. They end when `close` is called or the replica ends.
    """

    def __init__(self, method: StartMethod, num_workers: int = 2) -> None:
        """Raises MediaWorkerError when a worker does not write its first file within START_TIMEOUT_S."""
        self.method = method
        self._workers = [_Worker(method) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            worker.check()
            self._idle.put(worker)

    def write(self, file: FileToWrite) -> MediaFile:
        """The file as `media_files.write_file` writes it; waits for a free worker.

        The work of a worker that dies is done again by its successor. Raises GenerationFailedError where
        `write_file` raises, and after MAX_DEATHS deaths.
        """
        worker = self._idle.get()
        try:
            for _ in range(MAX_DEATHS):
                try:
                    return worker.write(file)
                except (EOFError, OSError):
                    logger.warning("the media worker %d died, another takes its place", worker.process_id)
                    worker = self._replace(worker)
        finally:
            self._idle.put(worker)
        raise GenerationFailedError(f"the processes that wrote the {file.format} file died {MAX_DEATHS} times in a row")

    def describe(self) -> dict[str, Any]:
        """How the pool was started and the processes it has now."""
        return {"method": self.method, "process_ids": self.process_ids, "idle": self._idle.qsize()}

    @property
    def process_ids(self) -> list[int]:
        return [worker.process_id for worker in self._workers]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _replace(self, dead: _Worker) -> _Worker:
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

    def check(self) -> None:
        try:
            self._connection.send(FileToWrite("png", [np.zeros((1, 1, 3), np.uint8)], {}))
            if not wait([self._connection, self._process.sentinel], START_TIMEOUT_S):
                raise TimeoutError(f"it did not answer within {START_TIMEOUT_S:g} s")
            self._receive()
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            self.close()
            raise MediaWorkerError(
                f"{VARIABLE}={self.method}: a media worker cannot be started: {error or 'it ended at once'}"
            ) from error

    def write(self, file: FileToWrite) -> MediaFile:
        """Raises EOFError or OSError when the process is gone, GenerationFailedError when it lives but could not."""
        self._connection.send(file)
        wait([self._connection, self._process.sentinel])
        return self._receive()

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


def _serve(connection: Connection) -> None:
    """The worker's life: it ends with the process that started it, even one that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    _leave_the_replica(keep=(connection.fileno(), int(parent.sentinel)))
    with contextlib.suppress(EOFError, OSError):
        while connection in wait([connection, parent.sentinel]):
            connection.send(_answer(connection.recv()))
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
