"""Opens the database of the job store, SQLite in a file or PostgreSQL, and brings its tables up to date."""

from __future__ import annotations

import functools
import json
import logging
import os
import sqlite3
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import alembic.command
import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from pydantic import AfterValidator, Discriminator, Tag
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, SQLAlchemyError

from env_config.secret import HOW, SecretReference

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
OPENING_S = 30  # for another process that opens the same file
WRITE_WAIT_S = 10  # for another process's write
CONNECT_S = 5  # to a PostgreSQL server
# A server whose machine is gone is noticed within some 25 s; one that hangs is given up by whoever asks (StoreThreads).
POSTGRESQL = {"connect_timeout": CONNECT_S, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
ADVISORY_LOCK = 0x7472_6970  # PostgreSQL's lock around the migrations: any number that is ours alone
SECRET_OPTIONS = ("password", "sslpassword")  # of the URL's query; libpq takes them there too


class JobStoreError(RuntimeError):
    """The job store cannot be opened; the sentence names the argument to correct."""


class JobStoreLostError(SQLAlchemyError):
    """The file of the job store was removed or replaced while it was open: what is written now would be lost."""


def check_has_no_password(url: str) -> str:
    """The URL, unless it has a password or cannot be read. Raises ValueError, whose text has nothing of it."""
    try:
        address = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError("must be a URL such as postgresql://host/database") from None
    if address.password is not None or any(name in address.query for name in SECRET_OPTIONS):
        raise ValueError(f"has a password in it: {HOW}; or put the password into PGPASSFILE")
    return url


StoreURL = Annotated[
    Annotated[str, AfterValidator(check_has_no_password), Tag("url")] | Annotated[SecretReference, Tag("reference")],
    Discriminator(lambda value: "url" if isinstance(value, str) else "reference"),
]


def open_database(url: str | SecretReference | None, folder: Path) -> sa.Engine:
    """The database at `url`, or jobs.sqlite in `folder`, with its tables as this version needs them.

    Raises JobStoreError, or SecretError where the URL cannot be read; neither shows a password.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address, secret_options = _address(url, folder)
    try:
        with _one_process_at_a_time(address):
            engine = DIALECTS[address.get_backend_name()](address, secret_options)
            migrate(engine)
    except (DBAPIError, OSError, sqlite3.Error) as error:
        reason = str(getattr(error, "orig", error)).strip().split("\n", 1)[0]
        raise JobStoreError(f"jobs.store_url: {address.render_as_string()} cannot be opened: {reason}") from error
    return engine


def migrate(engine: sa.Engine) -> None:
    """Apply the missing migrations; replicas that start together do it one after the other."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with writing(engine).begin() as connection:  # SQLite: the transaction is the lock
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        if MigrationContext.configure(connection).get_current_revision() == newest_revision():
            return
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


@functools.cache
def newest_revision() -> str | None:
    return ScriptDirectory(str(MIGRATIONS)).get_current_head()


def _one_process_at_a_time(address: sa.URL) -> AbstractContextManager[Any]:
    # The first switch of an SQLite file to its write-ahead log fails at once, unwaited, where two meet.
    if address.get_backend_name() == "sqlite":
        return FileLock(f"{address.database}.lock", timeout=OPENING_S)
    return nullcontext()


def writing(engine: sa.Engine) -> sa.Engine:
    """The same database for transactions that write: on SQLite they wait for each other before they read."""
    return engine.execution_options(writes=True)


def _address(url: str | SecretReference | None, folder: Path) -> tuple[sa.URL, dict[str, Any]]:
    """The address, and apart from it what its query has of secrets: SQLAlchemy shows a query."""
    if url is None:
        return sa.URL.create("sqlite", database=str(folder / "jobs.sqlite")), {}
    text = url if isinstance(url, str) else url.read("jobs.store_url")
    try:
        address = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise JobStoreError("jobs.store_url must be a URL such as postgresql://host/database") from None
    if address.get_backend_name() not in DIALECTS:
        allowed = " or ".join(DIALECTS)
        raise JobStoreError(f"jobs.store_url must begin with {allowed}, got {address.drivername!r}")
    if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
        raise JobStoreError("jobs.store_url must name a file: sqlite:////folder/jobs.sqlite")
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    secret_options = {name: address.query[name] for name in SECRET_OPTIONS if name in address.query}
    return address.difference_update_query(SECRET_OPTIONS), secret_options


def _sqlite(address: sa.URL, _: dict[str, Any]) -> sa.Engine:
    assert address.database is not None
    path = Path(address.database).resolve()
    with closing(sqlite3.connect(path)):  # makes the file; nothing else does, so that a lost one is noticed
        pass

    def connect() -> sqlite3.Connection:
        place = f"file:{quote(str(path))}?mode=rw"
        return sqlite3.connect(place, timeout=WRITE_WAIT_S, check_same_thread=False, uri=True)

    engine = sa.create_engine(address, creator=connect, json_deserializer=json_or_none, pool_timeout=WRITE_WAIT_S)
    wal = Path(f"{path}-wal")

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.text_factory = lambda text: text.decode("utf-8", "replace")  # a damaged value is one job's affair
        connection.isolation_level = None  # transactions begin below, not where Python guesses
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for the writer
        connection.execute("PRAGMA synchronous = FULL")  # what is committed outlives a loss of power
        connection.execute("PRAGMA foreign_keys = ON")
        record.info["file"] = _identity(path)

    @sa.event.listens_for(engine, "checkout")
    def check_that_it_is_the_same_file(_: Any, record: Any, __: Any) -> None:
        if not _is_same(record.info):
            logger.critical(
                "the job store %s was removed or replaced while it was open: put it back, or start again with an "
                "empty one; until then jobs are refused", path,
            )  # fmt: skip
            raise DisconnectionError("the file of the job store is another one")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
        if writes:
            connection.connection.info.setdefault("wal", _identity(wal))

    @sa.event.listens_for(engine, "commit")
    def check_that_it_will_last(connection: sa.Connection) -> None:
        if not _is_same(connection.connection.info):
            raise JobStoreLostError("the file of the job store was removed or replaced")

    def _is_same(info: Any) -> bool:
        return info["file"] == _identity(path) is not None and info.get("wal") in (None, _identity(wal))

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql(address: sa.URL, secret_options: dict[str, Any]) -> sa.Engine:
    asked = {name: value for name, value in POSTGRESQL.items() if name not in address.query}
    options = asked | secret_options
    try:
        return sa.create_engine(address, pool_pre_ping=True, pool_timeout=CONNECT_S, connect_args=options)
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
