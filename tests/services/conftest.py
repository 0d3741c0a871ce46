"""A job store in SQLite and the same in PostgreSQL, with a clock that the test turns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serve_app.jobs.database import open_database
from serve_app.jobs.store import JobStore
from tests.support.job_stores import Clock, MakeStore
from tests.support.postgresql import PostgreSQL, installed_programs, postgresql_server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_database(f"test_{os.urandom(6).hex()}")


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
def postgresql() -> Iterator[PostgreSQL]:
    programs = installed_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    with postgresql_server(programs) as server:
        yield server
