"""The application of one model in a process of this command's own, asked as a server elsewhere is.

The same routes, checks and stages as behind Ray Serve, over a socket that only this user may open; it ends with the
command, and leaves nothing behind. The order goes in as a line of JSON, a line comes out when it is ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx2

from env_config.children import environment_of_children
from serve_app.tools.command.exits import CommandError, Exit
from serve_app.tools.command.server.client import ANSWER_S, Server

PROCESS = [sys.executable, "-m", "serve_app.tools.command.server.here_process"]
LAST_LINES = 12  # of its log, where it dies


@dataclass(frozen=True)
class Order:
    """What is to be served: a MODEL, or an application of a Serve config, with these arguments over its own."""

    model: str | None = None
    config: str | None = None
    application: str | None = None
    name: str | None = None  # of one of its `models`
    dtype: str | None = None
    precision: str | None = None
    variant: str | None = None
    config_folder: str | None = None
    loras: Mapping[str, str] = field(default_factory=dict)  # files or places, by name
    device: str | None = None  # where neither the config nor the environment names one


@contextlib.contextmanager
def served_here(order: Order, command: list[str] | None = None) -> Iterator[Server]:
    """Yields when the model is loaded. Raises CommandError for one that cannot be served."""
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder, (Path(folder) / "log").open("w+b") as log:
        process = subprocess.Popen(
            command or PROCESS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command, which cancels before it ends this process
            env={**environment_of_children(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            _await_ready(process, json.dumps({"order": asdict(order), "folder": folder}), log)
            transport = httpx2.HTTPTransport(uds=socket_in(folder), verify=False)
            with httpx2.Client(transport=transport, base_url="http://localhost/", timeout=ANSWER_S) as client:
                yield Server(client, "the process of the model")
        finally:
            process.kill()
            process.communicate()


def socket_in(folder: str) -> str:
    return str(Path(folder) / "socket")


def _await_ready(process: subprocess.Popen[bytes], order: str, log: BinaryIO) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # its end is told below
        process.stdin.write(order.encode() + b"\n")
        process.stdin.flush()  # and open: it is how the process knows that the command lives
    answer = _answer(process.stdout.readline())
    if "ready" in answer:
        return
    if "problem" in answer:
        raise CommandError(answer["problem"], Exit(answer["exit"]))
    log.seek(0)
    said = "\n".join(log.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:])
    raise CommandError(f"the process of the model ended with the status {process.wait()}:\n{said}")


def _answer(line: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return answer
