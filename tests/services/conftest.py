"""A job store in SQLite and the same in PostgreSQL, with a clock that the test turns."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serve_app.jobs.database import open_database
from serve_app.jobs.store import JobStore
from tests.support.job_stores import Clock, MakeStore
from tests.support.served_application import free_port


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    server: str = request.getfixturevalue("postgresql_server")
    name = f"test_{os.urandom(6).hex()}"
    subprocess.run(
        ["psql", "-q", f"{server}/postgres", "-c", f"create database {name}"], check=True, capture_output=True
    )
    return f"{server}/{name}"


@pytest.fixture
def make_store(database_url: str, tmp_path: Path, clock: Clock) -> Iterator[MakeStore]:
    """Opens the same database anew at each call, as another process would."""
    with ExitStack() as cleaning:

        def make(application: str = "app") -> JobStore:
            store = JobStore(
                open_database(database_url, tmp_path), application, lifetime_s=100, clock=clock, monotonic=clock
            )
            cleaning.callback(store.close)
            return store

        yield make


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    return make_store()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A real server on a free port of 127.0.0.1; it refuses to run as root, so it runs as `nobody` there."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not installed or shutil.which("psql") is None:
        pytest.skip("no PostgreSQL server is installed")
    programs = installed[-1].parent
    as_user = {"user": "nobody"} if os.geteuid() == 0 else {}
    with ExitStack() as cleaning:
        folder = Path(tempfile.mkdtemp(prefix="triptych-postgresql-"))
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        if as_user:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        port = free_port()
        options = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off -p {port}"
        data = str(folder / "data")
        run = [
            [str(programs / "initdb"), "-D", data, "-U", "test", "-A", "trust", "-N"],
            [str(programs / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start"],
        ]
        for command in run:
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60, **as_user)
        cleaning.callback(
            subprocess.run,
            [str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop"],
            check=True, cwd=folder, stdout=subprocess.DEVNULL, **as_user,
        )  # fmt: skip
        yield f"postgresql://test@127.0.0.1:{port}"
