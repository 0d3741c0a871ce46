"""Python programs that start in a moment: `python -I -S client.py -m MODULE ...` runs as a fork, as do -c and scripts.

The first client starts the server that forks (`server.py`): one for all tests outside of Ray, and one for each job on
each node of Ray, whose library reads the job when it is imported; the nodes of one machine may share it. This process
imports next to nothing. It hands its streams and environment to the program, ends as the program does, by the same exit
code or signal, and ends the program with itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NoReturn

FOLDER = "TESTS_FORKS"  # names where the servers listen: a short path, their sockets have 107 characters
OWNER = "TESTS_FORKS_OWNER"  # names the process with which a server outside of Ray ends
ONE_FOR_ALL_NODES = "TESTS_FORKS_OF_ALL_NODES"  # is there where Ray's nodes share a server, which ends with OWNER too
NUMBER = struct.Struct("!i")  # as in server.py, whose imports are too many
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str]) -> NoReturn:
    server = connection(*place_and_owner())
    order = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(order).encode()
    socket.send_fds(server, [NUMBER.pack(len(message))], [0, 1, 2])
    server.sendall(message)
    program = number(server)
    for each in FORWARDED:
        signal.signal(each, lambda given, _: os.kill(program, given))
    end_as(number(server))


def place_and_owner() -> tuple[str, str]:
    """The socket of this process's server, and the id of the process with which that ends."""
    folder, raylet = os.environ[FOLDER], os.environ.get("RAY_RAYLET_PID")
    if raylet is None:
        return f"{folder}/tests", os.environ[OWNER]
    job = os.environ["RAY_JOB_ID"]
    if ONE_FOR_ALL_NODES in os.environ:
        return f"{folder}/{job}", os.environ[OWNER]
    return f"{folder}/{raylet}-{job}", raylet


def connection(place: str, owner: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(place):
            start_server(place, owner)
    server.connect(place)
    return server


def start_server(place: str, owner: str) -> None:
    log = os.open(f"{place}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, str(Path(__file__).with_name("server.py")), place, owner],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
        setpgroup=0,  # a signal to the group of this process is none to it
    )
    while not os.path.exists(place):
        if os.waitpid(pid, os.WNOHANG)[0]:
            sys.exit(f"no process is forked here: {Path(f'{place}.log').read_text()}")
        time.sleep(0.05)


def number(server: socket.socket) -> int:
    """The next that the server sends; the end of this process where the server ended."""
    data = server.recv(NUMBER.size, socket.MSG_WAITALL)
    if len(data) < NUMBER.size:
        sys.exit("the server of forks has ended")
    [value] = NUMBER.unpack(data)
    return int(value)


def end_as(status: int) -> NoReturn:
    """As a program that ended with this status of waitpid."""
    if os.WIFSIGNALED(status):
        given = os.WTERMSIG(status)
        if given != signal.SIGKILL:
            signal.signal(given, signal.SIG_DFL)
        os.kill(os.getpid(), given)
    sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(sys.argv[1:])
