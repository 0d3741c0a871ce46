"""Processes forked from one that has only imported the libraries: a case of its own, and the stages within a case."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Answer = Callable[[Any, Any], Any]  # makes a component call in the stage that holds the component
MAX_CHARS = 300


@dataclass(frozen=True)
class Failure:
    """An error of another process, as text."""

    kind: str  # the name of its class
    text: str
    trace: str
    is_ours: bool  # Triptych raised it on purpose
    kinds: tuple[str, ...] = ()  # names of its class and of what that builds on

    def sentence(self) -> str:
        """One line without paths of this machine; ours are sentences already."""
        line = _PATH.sub("the checkpoint", " ".join(self.text.split()))[:MAX_CHARS]
        return line if self.is_ours else f"{self.kind}: {line}"


_PATH = re.compile(r"(?<![\w.])/[^\s'\",:;()]*/[^\s'\",:;()]*")


class RemoteError(Exception):
    """A worker failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class Worker:
    """A forked process that answers calls of the methods of the object that `make` returns there."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, arguments, child, self._connection), daemon=True)
        self._process.start()
        child.close()

    def ask(self, method: str, *arguments: Any, answer: Answer | None = None) -> Any:
        """Raises RemoteError for what the method raises, and for the end of the process."""
        try:
            self._connection.send((method, arguments))
            while True:
                kind, value = self._connection.recv()
                if kind == "component_call":
                    assert answer is not None
                    self._connection.send(answer(*value))
                elif kind == "error":
                    raise RemoteError(value)
                else:
                    return value
        except (EOFError, ConnectionError) as error:
            raise RemoteError(Failure("ProcessDied", f"the process ended in {method}", "", False)) from error

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)


def failure_of(error: BaseException) -> Failure:
    kinds = tuple(each.__name__ for each in type(error).__mro__)
    trace = "".join(traceback.format_exception(error))[-6000:]
    return Failure(kinds[0], str(error)[:1500], trace, "TriptychError" in kinds, kinds)


def in_own_process(work: Callable[[], Any], timeout_s: float) -> Any:
    """What `work` returns; TimeoutError after `timeout_s`, ChildProcessError where it died.

    The process leads a session, and all that it left behind ends with it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        try:
            with os.fdopen(writer, "wb") as file:
                file.write(pickle.dumps(work()))
        except BaseException:  # noqa: BLE001  (it must not return into the caller's code)
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    made, deadline = b"", time.monotonic() + timeout_s
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                break
            made += chunk
        else:
            raise TimeoutError(f"it took longer than {timeout_s:.0f} s")
    finally:
        os.close(reader)
        _end_session(child)
    if not made:
        raise ChildProcessError("its process died")
    return pickle.loads(made)


def _end_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has not made its session yet, or all has ended
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)


def _serve(make: Callable[..., Any], arguments: tuple[Any, ...], connection: Connection, other_end: Connection) -> None:
    other_end.close()  # it ends with the process that forked it

    def ask_stage(other: Any, call: Any) -> Any:
        connection.send(("component_call", (other, call)))
        return connection.recv()

    worker = make(*arguments, ask_stage)
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", getattr(worker, method)(*values)))
        except Exception as error:  # noqa: BLE001  (the other side raises it)
            connection.send(("error", failure_of(error)))
