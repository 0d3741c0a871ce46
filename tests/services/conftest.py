"""A job store in SQLite and the same in PostgreSQL, with a clock that the test turns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serve_app.jobs import tables
from serve_app.jobs.database import open_database
from serve_app.jobs.store import JobStore
from tests.support.job_stores import Clock, MakeStore, put_tables
from tests.support.postgresql import PostgreSQL, installed_programs, postgresql_server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store without jobs."""
    if request.param == "sqlite":
        return f"sqlite:///{put_tables(tmp_path) / 'jobs.sqlite'}"
    url: str = request.getfixturevalue("emptied_database")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_database(f"new_{os.urandom(6).hex()}")


@pytest.fixture
def make_store(database_url: str, tmp_path: Path, clock: Clock) -> Iterator[MakeStore]:
    """Opens the same database anew at each call, as another process would."""
    with ExitStack() as cleaning:
        yield opener(database_url, tmp_path, clock, cleaning)


@pytest.fixture
def make_new_store(new_database_url: str, tmp_path: Path, clock: Clock) -> Iterator[MakeStore]:
    """The same for a database without tables."""
    with ExitStack() as cleaning:
        yield opener(new_database_url, tmp_path, clock, cleaning)


def opener(url: str, folder: Path, clock: Clock, cleaning: ExitStack) -> MakeStore:
    def make(application: str = "app") -> JobStore:
        store = JobStore(open_database(url, folder), application, lifetime_s=100, clock=clock, monotonic=clock)
        cleaning.callback(store.close)
        return store

    return make


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


@pytest.fixture(scope="session")
def shared_database(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With the tables in it: to make a database takes longer than most tests of it."""
    url = postgresql.create_database("shared")
    open_database(url, tmp_path_factory.mktemp("shared")).dispose()
    return url


@pytest.fixture
def emptied_database(postgresql: PostgreSQL, shared_database: str) -> str:
    postgresql.ask(f"truncate {', '.join(tables.metadata.tables)}", "shared")
    return shared_database
