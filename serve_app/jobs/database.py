"""Opens the database of the job store, SQLite in a file or PostgreSQL, and brings its tables up to date."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import alembic.command
import sqlalchemy as sa
from alembic.config import Config
from filelock import FileLock
from pydantic import AfterValidator, Discriminator, Tag
from sqlalchemy.exc import ArgumentError, OperationalError

from env_config.secret import HOW, SecretReference

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
WAIT_S = 30  # for another process's write
ADVISORY_LOCK = 0x7472_6970  # PostgreSQL's lock around the migrations: any number that is ours alone
SECRET_OPTIONS = ("password", "sslpassword")  # of the URL's query; libpq takes them there too


class JobStoreError(RuntimeError):
    """The job store cannot be opened; the sentence names the argument to correct."""


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
        engine = DIALECTS[address.get_backend_name()](address, secret_options)
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
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    secret_options = {name: address.query[name] for name in SECRET_OPTIONS if name in address.query}
    return address.difference_update_query(SECRET_OPTIONS), secret_options


def _sqlite(address: sa.URL, _: dict[str, Any]) -> sa.Engine:
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


def _postgresql(address: sa.URL, secret_options: dict[str, Any]) -> sa.Engine:
    try:
        return sa.create_engine(address, pool_pre_ping=True, connect_args=secret_options)
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
