"""A real PostgreSQL server on a free port of 127.0.0.1, which can be killed and started again with its data."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.served_application import free_port


@dataclass(frozen=True)
class PostgreSQL:
    """A running server; it refuses to run as root, and then runs as `nobody`."""

    programs: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        """Without a database."""
        return f"postgresql://test@127.0.0.1:{self.port}"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off -p {self.port}"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def kill(self) -> None:
        """As a crash does: nothing is written any more."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    def create_database(self, name: str) -> str:
        """Its URL."""
        self.ask(f"create database {name}")
        return f"{self.url}/{name}"

    def ask(self, sql: str, database: str = "postgres") -> None:
        subprocess.run(["psql", "-q", f"{self.url}/{database}", "-c", sql], check=True, capture_output=True)

    def processes(self) -> list[psutil.Process]:
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]

    def initialize(self) -> None:
        self._run("initdb", "-U", "test", "-A", "trust", "-N")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.programs / program), "-D", str(self.folder / "data"), *arguments],
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            timeout=60,
            user="nobody" if os.geteuid() == 0 else None,
        )


def installed_programs() -> Path | None:
    """The folder of the newest server that is installed, if there is one."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return servers[-1].parent if servers and shutil.which("psql") else None


@contextmanager
def postgresql_server(programs: Path) -> Iterator[PostgreSQL]:
    with ExitStack() as cleaning:
        folder = Path(tempfile.mkdtemp(prefix="triptych-postgresql-"))
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        if os.geteuid() == 0:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        server = PostgreSQL(programs, folder, free_port())
        server.initialize()
        server.start()
        cleaning.callback(server.kill)
        yield server
