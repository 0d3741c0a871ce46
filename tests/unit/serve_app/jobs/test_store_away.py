"""A job store that is locked, full, removed, replaced or hangs: said with 503, and nothing accepted that is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from serve_app.jobs import database, threads
from serve_app.jobs.database import JobStoreError, open_database
from serve_app.jobs.store import JobStore
from tests.support.in_process import Server
from tests.support.jobs_in_process import ended, server_with_jobs

BODY = {"prompt": "a cat", "n": 1}
AS_JOB = {"Prefer": "respond-async"}
ROUTES = [
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/image_1"),
    ("GET", "/v1/jobs/image_1/events"),
    ("POST", "/v1/jobs/image_1/cancel"),
    ("DELETE", "/v1/jobs/image_1"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/video_1"),
    ("GET", "/v1/videos/video_1/content"),
    ("DELETE", "/v1/videos/video_1"),
]


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    monkeypatch.setattr(database, "WRITE_WAIT_S", 0.2)
    async with server_with_jobs(tmp_path / "out") as (server, client):
        yield server, client


def file_of(server: Server) -> Path:
    return Path(str(server.service.jobs.store._engine.url.database))


async def ask(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    return await client.request(method, path, headers=AS_JOB, json=BODY if path.endswith("generations") else None)


async def check_that_all_is_503(client: httpx.AsyncClient) -> None:
    for method, path in ROUTES:
        answer = await ask(client, method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "job_store_unavailable"), path
        assert int(answer.headers["retry-after"]) > 0


def remove(file: Path) -> None:
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()


def replace(file: Path) -> None:
    """By an empty file, as a restore that went wrong."""
    remove(file)
    file.touch()


def drop_tables(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE jobs")


def damage(file: Path) -> None:
    for path in file.parent.glob(f"{file.name}*"):
        path.write_bytes(b"no database" * 1000)


@pytest.mark.parametrize("loss", [remove, replace, drop_tables])
async def test_a_store_that_is_lost_is_503_everywhere_and_takes_no_job(
    served: tuple[Server, httpx.AsyncClient], loss: Callable[[Path], None]
) -> None:
    server, client = served
    await ask(client, "GET", "/v1/jobs")
    loss(file_of(server))
    await check_that_all_is_503(client)
    assert (await client.post("/v1/images/generations", json=BODY)).status_code == 200, "this needs no job store"


async def test_a_store_that_is_put_back_has_its_jobs_and_goes_on(served: tuple[Server, httpx.AsyncClient]) -> None:
    server, client = served
    job = (await ask(client, "POST", "/v1/images/generations")).json()
    await ended(client, job["id"])
    file = file_of(server)
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(file.with_name("copy"))) as copy:
        source.backup(copy)
    remove(file)
    assert (await ask(client, "GET", f"/v1/jobs/{job['id']}")).status_code == 503
    shutil.copy(file.with_name("copy"), file)
    assert (await ask(client, "GET", f"/v1/jobs/{job['id']}")).json()["status"] == "completed"
    again = (await ask(client, "POST", "/v1/images/generations")).json()
    assert (await ended(client, again["id"]))["status"] == "completed"


def test_the_log_of_a_store_that_is_removed_is_noticed_before_a_commit(tmp_path: Path) -> None:
    store = JobStore(open_database(None, tmp_path))
    assert store.expired() == []
    store.release("nobody")
    os.unlink(tmp_path / "jobs.sqlite-wal")
    store.release("nobody")  # by a new connection, whose log is a new one
    assert (tmp_path / "jobs.sqlite-wal").exists()
    store.close()


async def test_a_locked_store_is_503_in_time_and_takes_jobs_when_it_is_free(
    served: tuple[Server, httpx.AsyncClient],
) -> None:
    server, client = served
    with closing(sqlite3.connect(file_of(server), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = await ask(client, "POST", "/v1/images/generations")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "job_store_unavailable")
        assert (await ask(client, "GET", "/v1/jobs")).status_code == 200, "readers do not wait for the writer"
        other.execute("ROLLBACK")
    job = (await ask(client, "POST", "/v1/images/generations")).json()
    assert (await ended(client, job["id"]))["status"] == "completed"


async def test_a_store_that_hangs_is_503_and_leases_have_threads_of_their_own(
    served: tuple[Server, httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = served
    monkeypatch.setattr(threads, "PATIENCE_S", 0.2)
    end, jobs = threading.Event(), server.service.jobs
    monkeypatch.setattr(jobs.store, "get", lambda *_: end.wait(60))
    answers = await asyncio.gather(*(ask(client, "GET", "/v1/jobs/image_1") for _ in range(12)))
    assert {answer.status_code for answer in answers} == {503}
    assert await jobs.leases.run(jobs.store.renew, "runner", ["image_1"], 10) == set()
    end.set()


@pytest.mark.parametrize("job_id", ["a%00b", "a%20b", "a" * 200, "%F0%9F%90%88", "a%2Fb"])
async def test_an_id_that_no_job_can_have_is_no_fault_of_ours(
    served: tuple[Server, httpx.AsyncClient], job_id: str
) -> None:
    _, client = served
    assert (await client.get(f"/v1/jobs/{job_id}")).status_code in (400, 404)  # 400: a NUL, which no address may have
    assert (await client.get("/v1/jobs", params={"after": "a b"})).status_code == 404


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(JobStoreError, match="must name a file"):
        open_database(url, tmp_path)


def test_a_damaged_store_is_refused_at_the_start(tmp_path: Path) -> None:
    open_database(None, tmp_path).dispose()
    damage(tmp_path / "jobs.sqlite")
    with pytest.raises(JobStoreError, match="cannot be opened"):
        open_database(None, tmp_path)
