"""A copy of the job store that was taken while it was written to is a whole one: the commands of docs/operations.md."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from serve_app.jobs.database import open_database
from serve_app.jobs.records import NewJob
from serve_app.jobs.store import JobStore
from tests.support.job_stores import Clock
from tests.support.postgresql import PostgreSQL


def opened(url: str, folder: Path, clock: Clock) -> JobStore:
    return JobStore(open_database(url, folder), "app", lifetime_s=100, clock=clock, monotonic=clock)


def add(store: JobStore, *ids: str) -> None:
    for job_id in ids:
        store.add(NewJob(job_id, "video", [{"prompt": "a cat"}], [b"png"], {"prompt": "a cat"}, ""))


def test_a_copy_of_a_sqlite_store_in_use_is_restored(tmp_path: Path, clock: Clock) -> None:
    file, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    with closing(opened(f"sqlite:///{file}", tmp_path, clock)) as store:
        add(store, "video_1", "video_2")
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        add(store, "video_3")
    with closing(opened(f"sqlite:///{copy}", tmp_path, clock)) as restored:
        assert [restored.get(each).status for each in ("video_1", "video_2")] == ["queued", "queued"]
        assert restored.input_images("video_1") == [b"png"]
        add(restored, "video_4")


@pytest.mark.skipif(shutil.which("pg_dump") is None, reason="pg_dump is not installed")
def test_a_dump_of_a_postgresql_store_in_use_is_restored(postgresql: PostgreSQL, tmp_path: Path, clock: Clock) -> None:
    url, copy = postgresql.create_database("original"), postgresql.create_database("restored")
    dump = str(tmp_path / "jobs.dump")
    with closing(opened(url, tmp_path, clock)) as store:
        add(store, "video_1", "video_2")
        subprocess.run(["pg_dump", "--format=custom", f"--file={dump}", url], check=True)
        add(store, "video_3")
    subprocess.run(["pg_restore", "--exit-on-error", "--no-owner", f"--dbname={copy}", dump], check=True)
    with closing(opened(copy, tmp_path, clock)) as restored:
        assert [restored.get(each).status for each in ("video_1", "video_2")] == ["queued", "queued"]
        assert restored.input_images("video_1") == [b"png"]
        add(restored, "video_4")
