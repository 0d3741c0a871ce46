"""The job store, in SQLite and in PostgreSQL: leases, takeover, pagination, idempotency, what survives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.errors import ConflictError, JobNotFoundError, LeaseLostError
from serve_app.jobs import tables
from serve_app.jobs.codec import Asked
from serve_app.jobs.database import JobStoreError, open_database
from serve_app.jobs.records import IdempotencyKey, NewJob, News, Output, OverdueJob, Webhook
from serve_app.jobs.store import JobStore
from tests.support.job_stores import Clock, MakeStore, watch


def new_job(job_id: str, owner: str = "", kind: str = "video") -> NewJob:
    return NewJob(job_id, kind, [{"prompt": "a cat \0"}], [b"png", b"jpeg"], {"prompt": "a cat \0"}, owner)


def output(request: int = 0, pending: bool = False, key: str = "videos/2026/11/21/a-0.mp4") -> Output:
    return Output(0, key, "video/mp4", 10, "ab" * 32, 7, 32, 32, 9, 16.0, pending, 12, request=request)


def add_one_a_second(store: JobStore, clock: Clock, count: int) -> list[str]:
    ids = [f"video_{number}" for number in range(count)]
    for job_id in ids:
        clock.now += 1
        store.add(new_job(job_id))
    return ids


# --- what is stored ---


def test_a_job_is_read_back_by_another_process_as_it_was_stored(make_store: MakeStore) -> None:
    added, is_new = make_store().add(new_job("video_1"))
    other = make_store()
    assert is_new
    assert other.get("video_1") == added
    assert (added.status, added.progress, added.shown) == ("queued", 0, {"prompt": "a cat \0"})
    assert other.input_images("video_1") == [b"png", b"jpeg"]


def test_the_migrations_make_the_tables_that_the_code_knows(new_database_url: str, tmp_path: Path) -> None:
    engine = open_database(new_database_url, tmp_path)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), tables.metadata)
    engine.dispose()
    assert differences == []


def test_processes_that_open_a_new_database_together_make_its_tables_once(make_new_store: MakeStore) -> None:
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: make_new_store(), range(4)))
    stores[0].add(new_job("video_1"))
    assert [store.get("video_1").id for store in stores] == ["video_1"] * 4


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(JobStoreError, match=r"jobs\.store_url") as error:
        open_database("postgresql://user:secret@127.0.0.1:1/jobs", tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["mysql://host/jobs", "jobs.sqlite"])
def test_another_kind_of_database_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(JobStoreError, match=r"jobs\.store_url must be"):
        open_database(url, tmp_path)


def test_an_application_neither_sees_nor_runs_the_jobs_of_another(make_store: MakeStore) -> None:
    make_store("flux").add(new_job("video_1"))
    other = make_store("wan")
    assert other.claim("runner", 10) is None
    with pytest.raises(JobNotFoundError):
        other.get("video_1")


# --- leases ---


def test_many_runners_claim_every_job_once(make_store: MakeStore, clock: Clock) -> None:
    store = make_store()
    ids = add_one_a_second(store, clock, 12)
    stores = [make_store() for _ in range(4)]

    def claim_all(number: int) -> list[str]:
        claimed = []
        while (job := stores[number].claim(f"runner {number}", 10)) is not None:
            claimed.append(job.id)
        return claimed

    with ThreadPoolExecutor(4) as threads:
        claimed = [job_id for each in threads.map(claim_all, range(4)) for job_id in each]
    assert sorted(claimed) == sorted(ids)


def test_jobs_are_claimed_in_the_order_they_came(store: JobStore, clock: Clock) -> None:
    ids = add_one_a_second(store, clock, 3)
    claimed = [job.id for _ in ids if (job := store.claim("runner", 10))]
    assert claimed == ids


def test_a_job_is_taken_over_when_its_lease_ends_and_not_before(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    store.claim("first", 10)
    watch(store, clock, 9)
    assert store.claim("second", 10) is None
    assert store.renew("first", ["video_1"], 10) == {"video_1"}
    watch(store, clock, 9)
    assert store.claim("second", 10) is None
    watch(store, clock, 2)
    job = store.claim("second", 10)
    assert job is not None
    assert (job.id, job.takeovers) == ("video_1", 1)
    assert store.renew("first", ["video_1"], 10) == set()


def test_a_job_that_is_postponed_waits_so_long_and_is_not_counted_as_taken_over(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    store.claim("first", 10)
    store.postpone("second", "video_1", 100)  # not its own
    store.postpone("first", "video_1", 5)
    assert [job.runner for job in store.unfinished()] == [None]
    watch(store, clock, 4)
    assert store.claim("second", 10) is None
    watch(store, clock, 2)
    job = store.claim("second", 10)
    assert job is not None
    assert (job.id, job.takeovers) == ("video_1", 0)


def test_a_runner_that_lost_its_lease_can_write_nothing(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    store.claim("first", 10)
    watch(store, clock, 11)
    store.claim("second", 10)
    for write in (
        lambda: store.save_progress("first", "video_1", 50, {}),
        lambda: store.save_checkpoint("first", "video_1", 0, 1, b"late"),
        lambda: store.save_outputs("first", "video_1", 0, [output()], {}),
        lambda: store.complete("first", "video_1"),
        lambda: store.fail("first", "video_1", {"code": "x", "message": "x"}),
    ):
        with pytest.raises(LeaseLostError):
            write()
    job = store.get("video_1")
    assert (job.status, job.progress, job.outputs, store.checkpoints("video_1")) == ("in_progress", 0, (), {})


def test_what_the_first_runner_saved_is_there_for_the_second(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    store.claim("first", 10)
    store.save_checkpoint("first", "video_1", 0, 1, b"one")
    store.save_checkpoint("first", "video_1", 0, 2, b"two")
    store.save_checkpoint("first", "video_1", 1, 5, b"other")
    store.save_outputs("first", "video_1", 1, [output(1)], {"denoise": 2.5})
    watch(store, clock, 11)
    job = store.claim("second", 10)
    assert job is not None
    assert store.checkpoints("video_1") == {0: b"two"}
    assert job.outputs == (output(1),)
    assert job.timings == {"1": {"denoise": 2.5}}


def test_a_released_job_is_free_at_once(store: JobStore) -> None:
    store.add(new_job("video_1"))
    store.claim("first", 10)
    store.release("first")
    assert store.get("video_1").status == "queued"
    assert store.claim("second", 10) is not None


def test_getting_further_clears_the_count_of_takeovers(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    counts = []
    for runner in ("a", "b", "c"):
        job = store.claim(runner, 10)
        assert job is not None
        counts.append(job.takeovers)
        watch(store, clock, 11)
    store.save_checkpoint("c", "video_1", 0, 1, b"x")
    job = store.claim("d", 10)
    assert job is not None
    assert [*counts, job.takeovers] == [0, 1, 2, 1]


# --- progress and ends ---


def test_progress_never_goes_back_and_reaches_100_only_with_completion(store: JobStore) -> None:
    store.add(new_job("video_1"))
    store.claim("runner", 10)
    seen = []
    for progress in (10, 60, 30):
        store.save_progress("runner", "video_1", progress, {"step": progress})
        seen.append(store.get("video_1").progress)
    store.complete("runner", "video_1")
    job = store.get("video_1")
    assert seen == [10, 60, 60]
    assert (job.status, job.progress) == ("completed", 100)
    with pytest.raises(AssertionError):
        store.save_progress("runner", "video_1", 100, {})


def test_events_are_numbered_and_read_from_any_number_on(store: JobStore) -> None:
    store.add(new_job("video_1"))
    store.claim("runner", 10)
    store.save_progress("runner", "video_1", 10, {"step": 1})
    store.save_outputs("runner", "video_1", 0, [output(pending=True)], {})
    store.complete("runner", "video_1")
    events = store.story("video_1", 0).events
    assert [event.number for event in events] == [1, 2, 3, 4, 5]
    assert [event.kind for event in events] == ["queued", "in_progress", "step", "stored", "completed"]
    assert events[3].data["upload"] == "pending"
    story = store.story("video_1", 3)
    assert (story.events, story.last_number, story.has_ended) == (events[3:], 5, True)
    assert store.story("video_1", None).events == []
    assert store.news({"video_1": 3, "video_2": 0}) == News({"video_1": events[3:]}, {"video_2"}, {})


def test_a_waiting_job_knows_how_many_are_before_it(store: JobStore, clock: Clock) -> None:
    ids = add_one_a_second(store, clock, 3)
    assert [store.queue_position(job_id) for job_id in ids] == [0, 1, 2]
    store.claim("runner", 10)
    assert [store.queue_position(job_id) for job_id in ids] == [None, 0, 1]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_cancelled_job_has_ended_and_is_its_runners_no_more(store: JobStore, is_running: bool) -> None:
    store.add(new_job("video_1"))
    if is_running:
        store.claim("runner", 10)
        store.save_outputs("runner", "video_1", 0, [output()], {})
    assert store.cancel("video_1").outputs == ((output(),) if is_running else ())
    assert (store.get("video_1").status, store.get("video_1").outputs) == ("cancelled", ())
    assert store.cancel("video_1").status == "cancelled"
    assert store.renew("runner", ["video_1"], 10) == set()
    assert store.claim("other", 10) is None
    assert [event.kind for event in store.story("video_1", 0).events][-1] == "cancelled"


def test_a_completed_job_cannot_be_cancelled(store: JobStore) -> None:
    store.add(new_job("video_1"))
    store.claim("runner", 10)
    store.complete("runner", "video_1")
    with pytest.raises(ConflictError, match="completed"):
        store.cancel("video_1")


def test_deleting_a_job_removes_everything_that_is_known_of_it(store: JobStore) -> None:
    store.add(new_job("video_1"), IdempotencyKey("key", "a" * 64))
    store.claim("runner", 10)
    store.save_checkpoint("runner", "video_1", 1, 1, b"x")
    store.save_outputs("runner", "video_1", 0, [output()], {})
    assert store.delete("video_1").outputs == (output(),)
    with pytest.raises(JobNotFoundError):
        store.get("video_1")
    with store._engine.connect() as connection:
        left = {
            name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in tables.metadata.tables.items()
        }
    assert left == dict.fromkeys(tables.metadata.tables, 0)


def test_a_job_expires_its_lifetime_after_its_end(store: JobStore, clock: Clock) -> None:
    store.add(new_job("video_1"))
    clock.now += 1000
    assert store.expired() == []
    store.claim("runner", 10)
    store.complete("runner", "video_1")
    assert store.get("video_1").expires_at == clock.now + 100
    clock.now += 101
    assert store.expired() == [], "it is looked at twice"
    clock.now += 100
    assert store.expired() == ["video_1"]


def test_an_upload_that_was_made_up_for_is_no_longer_pending(store: JobStore) -> None:
    store.add(new_job("video_1"))
    store.claim("runner", 10)
    store.save_outputs("runner", "video_1", 0, [output(pending=True)], {})
    store.mark_uploaded(output().key)
    assert [made.upload_pending for made in store.get("video_1").outputs] == [False]


def test_the_end_of_a_job_is_due_to_be_told_until_it_was(store: JobStore, clock: Clock) -> None:
    for job_id, url in (("video_1", "https://a.example/"), ("video_2", None)):
        store.add(replace(new_job(job_id), webhook_url=url))
        store.claim("runner", 10)
    assert store.take_webhook("sender", 60) is None
    store.complete("runner", "video_1")
    store.complete("runner", "video_2")
    webhook = Webhook("video_1", "video", "completed", clock.now, "https://a.example/", "a.example", 1)
    assert store.take_webhook("sender", 60) == webhook
    assert store.take_webhook("sender", 60) is None
    clock.now += 60  # who took it has died
    assert store.take_webhook("sender", 60, repeated=False) is None
    assert store.take_webhook("sender", 60, busy=["a.example"]) is None
    assert store.take_webhook("sender", 60) == replace(webhook, attempt=2)
    store.webhook_failed("sender", "video_1", 5)
    clock.now += 4
    assert store.take_webhook("sender", 60) is None
    clock.now += 2
    assert store.take_webhook("sender", 60) == replace(webhook, attempt=3)
    store.release("sender")
    assert store.take_webhook("other", 60) == replace(webhook, attempt=3), "the interrupted delivery does not count"
    clock.now -= 7200
    assert store.take_webhook("other", 60) is not None, "it was dated by a clock that was wrong"
    store.webhook_done("video_1")
    clock.now += 10_000
    assert store.take_webhook("other", 60) is None


def test_webhooks_that_were_never_tried_come_first(store: JobStore, clock: Clock) -> None:
    for number in range(3):
        store.add(replace(new_job(f"video_{number}"), webhook_url=f"https://{number}.example/"))
        store.claim("runner", 10)
        store.complete("runner", f"video_{number}")
        if number == 0:
            store.take_webhook("sender", 60)
            store.webhook_failed("sender", "video_0", 0)
        clock.now += 1
    taken = [store.take_webhook("sender", 60) for _ in range(3)]
    assert [each and each.job_id for each in taken] == ["video_1", "video_2", "video_0"]


# --- whose, and in which order ---


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_follow_each_other_without_gap_or_repeat(store: JobStore, clock: Clock, order: str) -> None:
    ids = add_one_a_second(store, clock, 3)
    clock.now += 1
    for name in ("b", "a", "c"):  # at the same moment: the id decides
        store.add(new_job(f"video_{name}"))
    ids += ["video_a", "video_b", "video_c"]
    after, seen, pages = None, [], []
    while True:
        page, has_more = store.page("", "video", after, 4, order)
        pages.append(len(page))
        seen += [job.id for job in page]
        after = page[-1].id
        if not has_more:
            break
    assert seen == (ids if order == "asc" else ids[::-1])
    assert pages == [4, 2]


def test_a_page_holds_only_the_owners_jobs_of_the_kind(store: JobStore) -> None:
    for job_id, owner, kind in (("1", "ann", "video"), ("2", "bob", "video"), ("3", "ann", "image")):
        store.add(new_job(job_id, owner, kind))
    page, has_more = store.page("ann", "video", None, 10, "asc")
    assert ([job.id for job in page], has_more) == (["1"], False)


def test_another_owners_job_is_not_found(store: JobStore) -> None:
    store.add(new_job("video_1", "ann"))
    for ask in (store.get, store.cancel, store.delete):
        with pytest.raises(JobNotFoundError):
            ask("video_1", "bob")
    with pytest.raises(JobNotFoundError):
        store.page("bob", None, "video_1", 10, "asc")


def test_the_same_key_and_body_give_the_same_job(store: JobStore) -> None:
    key = IdempotencyKey("key", "a" * 64)
    first, is_new = store.add(new_job("video_1"), key)
    second, is_new_again = store.add(new_job("video_2"), key)
    assert (is_new, is_new_again, first.id, second.id) == (True, False, "video_1", "video_1")
    with pytest.raises(JobNotFoundError):
        store.get("video_2")


def test_the_same_key_with_another_body_is_a_conflict(store: JobStore) -> None:
    store.add(new_job("video_1"), IdempotencyKey("key", "a" * 64))
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        store.add(new_job("video_2"), IdempotencyKey("key", "b" * 64))


def test_keys_of_different_owners_do_not_meet(store: JobStore) -> None:
    store.add(new_job("video_1", "ann"), IdempotencyKey("key", "a" * 64))
    _, is_new = store.add(new_job("video_2", "bob"), IdempotencyKey("key", "b" * 64))
    assert is_new


def test_one_job_comes_of_a_key_that_many_send_at_once(make_store: MakeStore) -> None:
    stores = [make_store() for _ in range(4)]

    def add(number: int) -> str:
        job, _ = stores[number].add(new_job(f"video_{number}"), IdempotencyKey("key", "a" * 64))
        return job.id

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(add, range(4)))) == 1


# --- who waits, and for how long ---


def test_jobs_that_a_caller_waits_for_are_claimed_before_the_others(store: JobStore, clock: Clock) -> None:
    add_one_a_second(store, clock, 2)
    clock.now += 1
    store.add(replace(new_job("video_9"), is_awaited=True))
    assert [store.queue_position(each) for each in ("video_9", "video_0", "video_1")] == [0, 1, 2]
    claimed = [store.claim("runner", 10, awaited_only) for awaited_only in (True, True, False, False)]
    assert [job and job.id for job in claimed] == ["video_9", None, "video_0", "video_1"]


def test_a_job_is_overdue_when_it_has_not_begun_or_not_ended_in_time(store: JobStore, clock: Clock) -> None:
    for job_id, limits in (("late", TimeLimits(10, 60)), ("begun", TimeLimits(10, 60)), ("free", NO_LIMITS)):
        store.add(replace(new_job(job_id), limits=limits))
        clock.now += 1
    assert [job.id for _ in range(3) if (job := store.claim("runner", 100))] == ["late", "begun", "free"]
    store.save_beginning("other", "begun")  # whose job it is not
    store.save_beginning("runner", "begun")
    assert store.overdue() == []
    clock.now += 20
    assert store.overdue() == [OverdueJob("late", "start_by", 10)]
    store.cancel("late", None, {"code": "start_timeout", "message": "too late", "status": 504})
    clock.now += 50
    assert store.overdue() == [OverdueJob("begun", "cancel_at", 60)]
    assert (store.get("late").status, (store.get("late").error or {})["status"]) == ("cancelled", 504)


def test_an_overdue_job_is_claimed_by_nobody(store: JobStore, clock: Clock) -> None:
    store.add(replace(new_job("video_1"), limits=TimeLimits(start_s=10)))
    store.add(replace(new_job("video_2"), limits=TimeLimits(total_s=10)))
    clock.now += 11
    assert store.claim("runner", 10) is None


# --- damage ---


@pytest.mark.parametrize("damage", [b'[{"prompt": "a c', b'[{"prompt": "\xff"}]', b"7"])
def test_a_job_whose_row_is_damaged_holds_up_no_other(tmp_path: Path, clock: Clock, damage: bytes) -> None:
    engine = open_database(None, tmp_path)
    store = JobStore(engine, clock=clock)
    add_one_a_second(store, clock, 2)
    with engine.begin() as connection:
        change = "update jobs set requests = cast(:damage as text), shown = cast(:damage as text) where id = 'video_0'"
        connection.execute(sa.text(change), {"damage": damage})
    claimed = [store.claim("runner", lease_s=10), store.claim("runner", lease_s=10)]
    assert [(job.id, job.shown) if job else None for job in claimed] == [
        ("video_0", {}),
        ("video_1", {"prompt": "a cat \0"}),
    ]
    assert claimed[0] is not None
    assert claimed[0].asked == Asked()
    store.close()
