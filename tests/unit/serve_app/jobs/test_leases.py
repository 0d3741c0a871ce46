"""Leases as one process observes them, while clocks are set and the store is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy as sa
from alembic.config import Config

from serve_app.jobs.database import MIGRATIONS, open_database
from serve_app.jobs.leases import LOOK_S, Lease, SeenLeases
from serve_app.jobs.records import NewJob
from serve_app.jobs.store import UNSERVED_S, JobStore
from tests.support.job_stores import Clock, put_tables, watch

LEASE_S = 10.0
DAY_S = 86_400.0


class Observer:
    """A process that looks once a second at what `heartbeat` makes of one lease."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.seen = SeenLeases(self.clock)
        self.heartbeat = 0

    def look(self) -> bool:
        """Whether the lease has ended."""
        return bool(self.seen.look([Lease("video_1", "runner", self.heartbeat, LEASE_S)]))

    def pass_seconds(self, seconds: int, beats: bool) -> bool:
        ended = False
        for _ in range(seconds):
            self.clock.now += 1
            self.heartbeat += beats
            ended = self.look()
        return ended


def test_a_lease_ends_when_its_heartbeat_stands_still_and_not_while_it_beats() -> None:
    observer = Observer()
    assert not observer.pass_seconds(100, beats=True)
    assert not observer.pass_seconds(int(LEASE_S), beats=False)
    assert observer.pass_seconds(1, beats=False)
    assert not observer.pass_seconds(1, beats=True), "a late heartbeat is one all the same"


def test_time_in_which_the_store_was_not_seen_does_not_count() -> None:
    observer = Observer()
    observer.look()
    for _ in range(10):
        observer.clock.now += LOOK_S + 1
        assert not observer.look()
    assert observer.pass_seconds(int(LEASE_S) + 1, beats=False)


# --- clocks that are set ---


class Machine:
    """Two processes that share a store; `wall` is the clock that people set, `monotonic` the one that nobody sets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall, self.monotonic = Clock(), Clock()
        self.stores: list[JobStore] = []

    def store(self, model: str | None = None) -> JobStore:
        engine = open_database(None, put_tables(self.path))
        clocks = {"clock": self.wall, "monotonic": self.monotonic}
        self.stores.append(JobStore(engine, lifetime_s=DAY_S, models=None if model is None else [model], **clocks))
        return self.stores[-1]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for store in made.stores:
        store.close()


@pytest.mark.parametrize("jump_s", [-3600, -7 * DAY_S, 20, 2 * DAY_S])
def test_a_dead_runners_job_is_taken_over_after_its_lease_whatever_the_clock_says(
    machine: Machine, jump_s: float
) -> None:
    dead, alive = machine.store(), machine.store()
    dead.add(NewJob("video_1", "video", [{}]))
    dead.claim("dead", LEASE_S)
    assert alive.claim("alive", LEASE_S) is None
    machine.wall.now += jump_s
    watch(alive, machine.monotonic, int(LEASE_S) - 1)
    assert alive.claim("alive", LEASE_S) is None, "a jump alone ends no lease"
    watch(alive, machine.monotonic, 2)
    job = alive.claim("alive", LEASE_S)
    assert job is not None
    assert job.takeovers == 1


def test_a_paused_job_waits_its_pause_whatever_the_clock_says(machine: Machine) -> None:
    store = machine.store()
    store.add(NewJob("video_1", "video", [{}]))
    store.claim("runner", LEASE_S)
    store.postpone("runner", "video_1", 5)
    machine.wall.now -= 3600
    watch(store, machine.monotonic, 4)
    assert store.claim("runner", LEASE_S) is None
    watch(store, machine.monotonic, 2)
    assert store.claim("runner", LEASE_S) is not None


def test_a_clock_that_is_two_days_ahead_removes_nothing_that_was_just_made(machine: Machine) -> None:
    store = machine.store()
    store.add(NewJob("video_1", "video", [{}]))
    store.claim("runner", LEASE_S)
    store.complete("runner", "video_1")
    machine.wall.now += 2 * DAY_S
    for _ in range(100):
        machine.monotonic.now += 60
        assert store.expired() == []
    restarted = machine.store()
    assert restarted.expired() == [], "nor at once after a restart"
    machine.monotonic.now += 60
    assert restarted.expired() == []
    machine.wall.now -= 2 * DAY_S
    machine.monotonic.now += 3600
    assert restarted.expired() == []


def test_a_job_is_removed_when_its_time_is_really_over(machine: Machine) -> None:
    store = machine.store()
    store.add(NewJob("video_1", "video", [{}]))
    store.claim("runner", LEASE_S)
    store.complete("runner", "video_1")
    for clock in (machine.wall, machine.monotonic):
        clock.now += DAY_S + 1
    assert store.expired() == []
    for clock in (machine.wall, machine.monotonic):
        clock.now += 601
    assert store.expired() == ["video_1"]


# --- a model that is updated ---


def add_jobs_of(store: JobStore, model: str, count: int) -> None:
    row = {"version": 1, "work": {"model": model, "seed": 1, "output": {"kind": "video", "format": "mp4"}}}
    for number in range(count):
        store.add(NewJob(f"video_{number}", "video", [row]))


def test_jobs_of_a_model_whose_replicas_are_only_busy_are_left_to_them_and_not_once_these_are_gone(
    machine: Machine,
) -> None:
    old, new, other_new = machine.store("old"), machine.store("new"), machine.store("new")
    add_jobs_of(old, "old", 3)
    assert old.claim("old", LEASE_S) is not None
    for _ in range(5 * int(UNSERVED_S)):
        machine.monotonic.now += 1
        old.renew("old", ["video_0"], LEASE_S)
        assert new.claim("new", LEASE_S) is None, "the backlog is that of a replica that drains"
    for _ in range(int(LEASE_S + UNSERVED_S)):
        assert new.claim("new", LEASE_S) is None
        assert other_new.claim("other", LEASE_S) is None
        machine.monotonic.now += 1
    claimed = [each and each.id for each in (new.claim("new", LEASE_S), other_new.claim("other", LEASE_S))]
    assert claimed == ["video_1", "video_2"], "a claim of one to fail it does not hold up the others"


# --- a database of the version before ---


def test_a_running_job_of_the_version_before_is_taken_over(machine: Machine) -> None:
    engine = sa.create_engine(f"sqlite:///{machine.path / 'jobs.sqlite'}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0003")
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, application, kind, owner, status, progress, created_at, requests, shown, timings, "
            "takeovers, lease_owner, lease_until) VALUES "
            "('video_1', '/wan', 'video', '', 'in_progress', 0, 1, '[{}]', '{}', '{}', 0, 'dead', 99999999999)"
        )
    engine.dispose()
    store = machine.store()
    assert store.claim("alive", LEASE_S) is None
    watch(store, machine.monotonic, 16)
    job = store.claim("alive", LEASE_S)
    assert job is not None
    assert job.takeovers == 1
