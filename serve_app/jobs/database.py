"""Opens the database of the job store, SQLite in a file or PostgreSQL, and brings its tables up to date."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import alembic.command
import sqlalchemy as sa
from alembic.config import Config
from filelock import FileLock
from sqlalchemy.exc import ArgumentError, OperationalError

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
WAIT_S = 30  # for another process's write
ADVISORY_LOCK = 0x7472_6970  # PostgreSQL's lock around the migrations: any number that is ours alone


class JobStoreError(RuntimeError):
    """The job store cannot be opened; the sentence names the argument to correct."""


def open_database(url: str | None, folder: Path) -> sa.Engine:
    """The database at `url`, or jobs.sqlite in `folder`, with its tables as this version needs them.

    Raises JobStoreError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = _address(url, folder)
    try:
        engine = DIALECTS[address.get_backend_name()](address)
        with _one_process_at_a_time(address):
            migrate(engine)
    except OperationalError as error:
        reason = str(error.orig).strip().split("\n", 1)[0]
        raise JobStoreError(f"jobs.store_url: {address.render_as_string()} cannot be opened: {reason}") from error
    return engine


def migrate(engine: sa.Engine) -> None:
    """Apply the missing migrations; replicas that start together do it one after the other."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with writing(engine).begin() as connection:  # SQLite: the transaction is the lock
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


def _one_process_at_a_time(address: sa.URL) -> AbstractContextManager[Any]:
    # The first switch of an SQLite file to its write-ahead log fails at once, unwaited, where two meet.
    if address.get_backend_name() == "sqlite":
        return FileLock(f"{address.database}.lock", timeout=WAIT_S)
    return nullcontext()


def writing(engine: sa.Engine) -> sa.Engine:
    """The same database for transactions that write: on SQLite they wait for each other before they read."""
    return engine.execution_options(writes=True)


def _address(url: str | None, folder: Path) -> sa.URL:
    if url is None:
        return sa.URL.create("sqlite", database=str(folder / "jobs.sqlite"))
    try:
        address = sa.make_url(url)
    except ArgumentError as error:
        raise JobStoreError(f"jobs.store_url must be a URL such as postgresql://host/database: {error}") from error
    if address.get_backend_name() not in DIALECTS:
        allowed = " or ".join(DIALECTS)
        raise JobStoreError(f"jobs.store_url must begin with {allowed}, got {address.drivername!r}")
    if address.drivername == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    return address


def _sqlite(address: sa.URL) -> sa.Engine:
    connect_args = {"timeout": WAIT_S, "check_same_thread": False}
    engine = sa.create_engine(address, connect_args=connect_args, json_deserializer=json_or_none)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.text_factory = lambda text: text.decode("utf-8", "replace")  # a damaged value is one job's affair
        connection.isolation_level = None  # transactions begin below, not where Python guesses
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for the writer
        connection.execute("PRAGMA synchronous = FULL")  # what is committed outlives a loss of power
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: sa.URL) -> sa.Engine:
    try:
        return sa.create_engine(address, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise JobStoreError(
            f"jobs.store_url: PostgreSQL needs {error.name!r}; install it with: pip install 'triptych[postgresql]'"
        ) from error


def json_or_none(text: str) -> Any:
    """A damaged value must not keep a runner from the jobs behind it: the job that has it fails alone."""
    try:
        return json.loads(text)
    except ValueError as error:
        logger.error("a value of the job store cannot be read: %s", error)
        return None


DIALECTS = {"sqlite": _sqlite, "postgresql": _postgresql}
