"""A process that has imported what most others import, and forks each Python program that it is asked to run.

    python server.py SOCKET OWNER

An import of torch with diffusers takes longer than most of what tests do with them. What runs in a child is the real
program, with its own environment, folder and streams: it is killed and ends as it would be anywhere (`client.py`).
The server has the variables that libraries read at their import. It ends with the process of the id OWNER.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import types
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

# Those that tests and replicas use most, with what the tiny models of most tests import when they are loaded.
LIBRARIES = (
    "pytest",
    "ray._private.workers.default_worker",
    "ray.serve._private.replica",
    "torch",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.wan.pipeline_wan",
    "cache_dit",
    "peft",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "boto3",
    "sqlalchemy.orm",
    "alembic.command",
    "av",
)
# Only for Ray's workers: tests import the project themselves, which makes a warning there an error.
PROJECT = ("deployments.stage_replica", "serve_app.ingress")
STREAMS = (0, 1, 2)
NUMBER = struct.Struct("!i")  # of bytes, a process's id, how it ended: all that is sent but the order's JSON


@dataclass(frozen=True)
class Order:
    """A program: the arguments that follow `python`, which are `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]


@dataclass(frozen=True)
class Child:
    """A program that runs; `end` is readable when it has ended, `client` when nobody waits for it any more."""

    pid: int
    end: int
    client: socket.socket

    def close(self) -> None:
        os.close(self.end)
        self.client.close()


def main(path: str, owner: int) -> None:
    preloaded = (*LIBRARIES, *(PROJECT if "RAY_JOB_ID" in os.environ else ()))
    gc.disable()  # it would go through all that stays again and again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a child has filters of its own
        for name in preloaded:
            importlib.import_module(name)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"a process of {threads} threads cannot be forked: an import of {preloaded} started one")
    gc.freeze()
    gc.enable()
    order = order_of_a_child(path, owner)
    if order is not None:
        run(order)


def order_of_a_child(path: str, owner: int) -> Order | None:
    """Returns in each child what it is to run, and None in the server when its owner has ended."""
    with ExitStack() as opened:  # closed in a child as well, which keeps nobody from seeing the end of another
        selector = opened.enter_context(selectors.DefaultSelector())
        listener = opened.enter_context(listening(path))
        owners_end = os.pidfd_open(owner)
        opened.callback(os.close, owners_end)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(owners_end, selectors.EVENT_READ)
        children: dict[int, Child] = {}
        while True:
            for key, _ in selector.select():
                descriptor = key.fd
                if selector.get_map().get(descriptor) is not key:
                    continue  # closed in this round, and perhaps another one's by now
                if descriptor == owners_end:
                    Path(path).unlink(missing_ok=True)
                    return None
                if descriptor != listener.fileno():
                    end(selector, children, descriptor)
                    continue
                client, _ = listener.accept()
                order = received(client)
                if order is None:
                    client.close()
                    continue
                if (pid := os.fork()) == 0:
                    for each in children.values():
                        each.close()
                    client.close()
                    return order
                child = Child(pid, os.pidfd_open(pid), client)
                watch(selector, children, child)
                send(client, pid)
                for stream in order.streams:
                    os.close(stream)


def listening(path: str) -> socket.socket:
    """Under that path as soon as a client can connect."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.unready")
    listener.listen(100)
    os.rename(f"{path}.unready", path)
    return listener


def received(client: socket.socket) -> Order | None:
    """None from a client that was killed before it had said all."""
    header, streams, _, _ = socket.recv_fds(client, NUMBER.size, len(STREAMS))
    if len(header) == NUMBER.size:
        [size] = NUMBER.unpack(header)
        with client.makefile("rb") as file:
            message = file.read(size)
        if len(message) == size:
            return Order(**json.loads(message), streams=streams)
    for stream in streams:
        os.close(stream)
    return None


def send(client: socket.socket, number: int) -> None:
    """To a client that may have been killed, which is seen elsewhere."""
    with contextlib.suppress(BrokenPipeError):
        client.sendall(NUMBER.pack(number))


def watch(selector: selectors.BaseSelector, children: dict[int, Child], child: Child) -> None:
    children[child.pid] = child
    selector.register(child.end, selectors.EVENT_READ, child)
    selector.register(child.client, selectors.EVENT_READ, child)


def end(selector: selectors.BaseSelector, children: dict[int, Child], descriptor: int) -> None:
    """The child that is watched by it has ended, or else its client has, with which it is killed."""
    if descriptor not in selector.get_map():
        return  # both have, and the other was seen first
    child: Child = selector.get_key(descriptor).data
    selector.unregister(child.end)
    selector.unregister(child.client)
    if descriptor == child.end:
        _, status = os.waitpid(child.pid, 0)
        send(child.client, status)
    else:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
    child.close()
    del children[child.pid]


def run(order: Order) -> None:
    """As `python` would in a new process, which is the first of a group of its own."""
    os.setpgid(0, 0)
    for stream, number in zip(order.streams, STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    first, *others = order.arguments
    sys.path[0] = order.folder
    given = order.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [each for each in given if each and each not in sys.path]
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = order.arguments
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
