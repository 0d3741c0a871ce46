"""A storage that hangs, or fails in ways that nobody thought of: what it may cost, and how it is found to be back."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from deployments.errors import StorageError
from serve_app.bounded_threads import BoundedThreads, ThreadsClosedError, ThreadsExhaustedError
from serve_app.errors import ObjectNotFoundError, StorageAwayError
from serve_app.storage import guarded
from serve_app.storage.base import StoredObject
from serve_app.storage.guarded import Breaker, GuardedStorage, Patience
from serve_app.storage.local import LocalStorage
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from tests.support.in_process import until
from tests.support.job_stores import Clock
from tests.support.stored_files import DATA, KEY

QUICK = Patience(0.3, 1e9, max_calls=4)


class Failing(LocalStorage):
    """Hangs, or raises `error`, as long as it is told to; counts its calls."""

    is_shared = True
    hangs = False
    error: BaseException | None = None
    num_calls = 0

    async def check(self) -> None:
        await self._answer()

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        await self._answer()
        return await super().store(key, data, content_type, metadata)

    async def _answer(self) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


async def store(storage: GuardedStorage | SpooledStorage) -> StoredObject:
    return await storage.store(KEY, DATA, "image/png", {})


@pytest.fixture
def backend(tmp_path: Path) -> Failing:
    return Failing(tmp_path / "bucket")


async def test_a_call_that_hangs_ends_within_its_time_and_the_next_ones_are_not_made(backend: Failing) -> None:
    storage = GuardedStorage(backend, QUICK)
    backend.hangs = True
    outcomes = await asyncio.gather(*(store(storage) for _ in range(20)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [StorageAwayError] * 20
    assert backend.num_calls == QUICK.max_calls, "those behind them did not wait for their own time-out"


@pytest.mark.parametrize("error", [RecursionError(), ValueError("broken XML"), OSError(5, "reset"), KeyError("Error")])
async def test_an_error_of_any_kind_is_a_storage_error(backend: Failing, error: Exception) -> None:
    backend.error = error
    with pytest.raises(StorageAwayError):
        await store(GuardedStorage(backend, QUICK))


async def test_a_refusal_is_an_answer_so_the_next_call_is_made(backend: Failing) -> None:
    storage = GuardedStorage(backend, QUICK)
    backend.error = StorageError("access denied")
    for _ in range(3):
        with pytest.raises(StorageError, match="denied"):
            await store(storage)
    assert backend.num_calls == 3


async def test_one_call_at_a_time_finds_out_whether_the_storage_is_back(backend: Failing) -> None:
    clock = Clock()
    storage = GuardedStorage(backend, QUICK, Breaker(clock))
    backend.hangs = True
    calls = []
    for pause_s in (1.0, 2.0, 4.0):
        await asyncio.gather(*(store(storage) for _ in range(3)), return_exceptions=True)
        calls.append(backend.num_calls)
        clock.now += pause_s - 0.1
        await asyncio.gather(store(storage), return_exceptions=True)
        assert backend.num_calls == calls[-1], "the pause is not over"
        clock.now += 0.2
    assert calls == [3, 4, 5]
    backend.hangs = False
    await store(storage)
    await asyncio.gather(*(store(storage) for _ in range(3)))


async def test_a_trial_whose_caller_hangs_up_leaves_the_next_one_to_try(backend: Failing) -> None:
    clock = Clock()
    storage = GuardedStorage(backend, QUICK, Breaker(clock))
    backend.hangs = True
    await asyncio.gather(store(storage), return_exceptions=True)
    clock.now += 2
    trial = asyncio.create_task(store(storage))
    await asyncio.sleep(0.01)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    backend.hangs = False
    await store(storage)


async def test_a_large_file_has_more_time(backend: Failing) -> None:
    assert guarded.OF_CALLERS.for_bytes(2_000_000) < 10
    assert guarded.OF_CALLERS.for_bytes(100_000_000) < 30
    assert guarded.OF_UPLOADS.for_bytes(100_000_000) > 300, "a slow line brings it through in the end"


async def test_a_storage_that_hangs_costs_one_time_out_then_outputs_are_spooled_at_once(
    backend: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.storage.spool.OF_CALLERS", QUICK)
    monkeypatch.setattr(guarded, "OF_UPLOADS", QUICK)
    monkeypatch.setattr("serve_app.storage.spool.OF_UPLOADS", QUICK)
    monkeypatch.setattr(guarded, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr("serve_app.storage.spool.FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr("serve_app.storage.spool.IDLE_PAUSE_S", 0.05)
    spooled = SpooledStorage(backend, tmp_path / "spool")
    backend.hangs = True
    assert (await store(spooled)).upload_pending
    num_calls = backend.num_calls
    for _ in range(10):
        assert (await store(spooled)).upload_pending
    assert backend.num_calls == num_calls
    assert await spooled.load(KEY) == (DATA, "image/png")
    backend.hangs = False
    uploaded: list[str] = []

    async def note(key: str) -> None:
        uploaded.append(key)

    uploads = asyncio.create_task(SpoolUploads(spooled, note).run())
    await until(lambda: uploaded == [KEY])
    assert not (await store(spooled)).upload_pending
    uploads.cancel()


async def test_a_process_that_uploads_nothing_finds_out_too_that_the_storage_is_back(
    backend: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("serve_app.storage.spool.FIRST_PAUSE_S", 0.05)
    spooled = SpooledStorage(backend, tmp_path / "spool")
    backend.error = TimeoutError()
    assert (await store(spooled)).upload_pending
    backend.error = None
    with FileLock(tmp_path / "spool" / ".lock", thread_local=False):  # another process uploads
        finding = asyncio.create_task(SpoolUploads(spooled, lambda _: asyncio.sleep(0)).run())
        await until(lambda: not spooled.breaker.is_open)
        assert not (await store(spooled)).upload_pending
        finding.cancel()


# --- threads ---


async def test_nothing_else_waits_for_calls_that_hang_and_their_number_is_bounded() -> None:
    threads, end = BoundedThreads("test", max_running=2, max_left=3), threading.Event()

    async def hang() -> None:
        async with asyncio.timeout(0.05):
            await threads.run(end.wait)

    for _ in range(3):
        with pytest.raises(TimeoutError):
            await hang()
    with pytest.raises(ThreadsExhaustedError):
        await threads.run(int)
    assert await asyncio.to_thread(int) == 0
    end.set()
    async with asyncio.timeout(10):
        while threads._left:
            await asyncio.sleep(0.01)
            threads._left = [thread for thread in threads._left if thread.is_alive()]
    assert await threads.run(lambda: 7) == 7


async def test_a_stop_waits_for_what_runs_but_not_for_ever() -> None:
    threads, end = BoundedThreads("test", max_running=2), threading.Event()
    call = asyncio.create_task(threads.run(end.wait))
    await asyncio.sleep(0.01)
    began = time.monotonic()
    threads.close(wait_s=0.1)
    assert time.monotonic() - began < 5
    with pytest.raises(ThreadsClosedError):
        await threads.run(int)
    end.set()
    assert await call


async def test_what_a_call_raises_is_raised_where_it_was_made() -> None:
    def fail() -> None:
        raise ObjectNotFoundError("there is no file")

    with pytest.raises(ObjectNotFoundError):
        await BoundedThreads("test", max_running=1).run(fail)
