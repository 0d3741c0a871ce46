"""A PostgreSQL server that hangs or ends: whoever asks is told in time, and the store is there again afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve_app.errors import JobNotFoundError, JobStoreAwayError
from serve_app.jobs import threads
from serve_app.jobs.database import open_database
from serve_app.jobs.records import NewJob
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import StoreThreads
from tests.support.postgresql import PostgreSQL


@pytest.fixture
def store(emptied_database: str, tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(open_database(emptied_database, tmp_path))
    yield made
    made.close()


@pytest.fixture
def running(store: JobStore) -> Iterator[StoreThreads]:
    made = StoreThreads()
    yield made
    made.close()


@contextmanager
def stopped(server: PostgreSQL) -> Iterator[None]:
    """The server with all its processes stands still; it still takes connections, as its machine does that."""
    processes = server.processes()
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


async def test_a_server_that_hangs_is_told_in_time_and_found_again(
    store: JobStore, running: StoreThreads, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "PATIENCE_S", 0.5)
    store.add(NewJob("video_1", "video", [{}]))
    with stopped(postgresql):
        outcomes = await asyncio.gather(*(running.run(store.get, "video_1") for _ in range(8)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [JobStoreAwayError] * 8
    monkeypatch.setattr(threads, "PATIENCE_S", 20)
    assert (await running.run(store.get, "video_1")).id == "video_1"


async def test_connections_that_the_server_ends_are_no_error_of_the_next_question(
    store: JobStore, running: StoreThreads, postgresql: PostgreSQL
) -> None:
    store.add(NewJob("video_1", "video", [{}]))
    postgresql.ask("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
    assert (await running.run(store.get, "video_1")).id == "video_1"


@pytest.mark.parametrize("job_id", ["a\0b", "\ud800", "' or 1=1 --", ""])
def test_an_id_that_the_database_could_not_even_look_for_is_not_found(store: JobStore, job_id: str) -> None:
    for ask_for in (store.get, store.cancel, store.delete, store.queue_position):
        with pytest.raises(JobNotFoundError):
            ask_for(job_id)
    with pytest.raises(JobNotFoundError):
        store.page("", None, job_id, 10, "asc")
