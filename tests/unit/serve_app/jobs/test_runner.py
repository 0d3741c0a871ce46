"""Running jobs with stages that the test plays: takeover at the checkpoint, cancel, failures, progress, events."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import sqlalchemy as sa
from PIL import Image
from ray.exceptions import RaySystemError, RayTaskError
from ray.serve.exceptions import RayServeException
from sqlalchemy.exc import OperationalError

from deployments.errors import (
    GenerationFailedError,
    InvalidRequestError,
    NotSupportedError,
    OtherVersionError,
    StageUnavailableError,
    StorageError,
)
from deployments.messages import (
    Checkpoint,
    DenoisingProgress,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    RequestWarning,
    StageDescription,
)
from env_config.secret import SecretReference
from serve_app.deadlines import TimeLimits
from serve_app.errors import ConflictError, JobNotFoundError, JobStoreAwayError, ObjectNotFoundError, OverloadedError
from serve_app.http.sse import sse_of_job
from serve_app.jobs import ledger, runner, tables
from serve_app.jobs.codec import (
    checkpoint_from_bytes,
)
from serve_app.jobs.database import open_database
from serve_app.jobs.records import IdempotencyKey, Job, NewJob, News
from serve_app.jobs.service import JobArgs, Jobs
from serve_app.jobs.store import JobStore
from serve_app.jobs.webhooks import sender
from serve_app.jobs.webhooks.delivery import WebhookRules
from serve_app.making.admission import Admission, AdmissionArgs
from serve_app.making.at_once import MakeAtOnce
from serve_app.making.follower import Follower
from serve_app.storage.base import StoredObject
from serve_app.storage.local import LocalStorage
from tests.support.in_process import TEXT_TO_IMAGE, description, picture
from tests.support.job_stores import put_tables
from tests.support.recorded_meter import RecordedMeter
from tests.support.web_server import Receiver, web_server

WAIT_S = 60
WAN = description("WanPipeline", "num_frames", media_kind="video", tasks=("text_to_video",))
STEPS = 10


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    monkeypatch.setattr(ledger, "PAUSE_S", 0.02)
    monkeypatch.setattr(runner, "WRITE_PAUSE_S", 0.0)
    monkeypatch.setattr(runner, "WRITE_SHARE", 1.0)


def request_of(job_id: str, seed: int = 7, prompt: str = "a cat", model: str = "wan") -> GenerationRequest:
    arguments = {"prompt": prompt, "num_inference_steps": STEPS}
    return GenerationRequest(job_id, model, arguments, seed, OutputFormat("video", "mp4"))


class Stages:
    """Plays the stages: makes the file of a request in STEPS steps, with a checkpoint after each."""

    def __init__(self) -> None:
        self.began_at: list[int] = []  # the first step of each generation
        self.hold_at: int | None = None  # the step at which a generation waits until `held` is set
        self.held = asyncio.Event()
        self.reached = asyncio.Event()
        self.failures: list[Exception] = []  # raised by the next generations, one each
        self.cancelled = 0
        self.seconds = {"denoise": 1.5}

    async def make(self, request: GenerationRequest, follower: Follower) -> Media:
        assert follower.wants_progress
        resume_from = follower.resume_from
        start = resume_from.step if resume_from else 0
        self.began_at.append(start)
        if self.failures:
            raise self.failures.pop(0)
        state = int(resume_from.content.buffers[0][0]) if resume_from else request.seed
        try:
            for step in range(start + 1, STEPS + 1):
                await asyncio.sleep(0.005)
                state = (state * 5 + step) % 256
                follower.on_progress(DenoisingProgress(step, STEPS, 0.1))
                content = Packed({"kind": "state"}, (np.array([state], np.uint8),))
                follower.on_checkpoint(Checkpoint(request.request_id, step, "print", "digest", content))
                if step <= follower.previews:
                    follower.on_preview(step, Media((MediaFile(picture(width=512, height=128)),)))
                if step == self.hold_at:
                    self.reached.set()
                    await self.held.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Media((MediaFile(bytes([state]) * 100, "video/mp4", 32, 32, 9, 16.0),), self.seconds)


class Described:
    """In place of a served model."""

    configured_arguments = ({},)

    def __init__(self, describing: StageDescription = WAN, again: Sequence[StageDescription | Exception] = ()) -> None:
        """`again`: what its stages say when they are asked again, one after another; what is kept by default."""
        self.describing = describing
        self.again = list(again)

    async def describe(self) -> StageDescription:
        return self.describing

    async def describe_again(self) -> StageDescription:
        answer = self.again.pop(0) if self.again else self.describing
        if isinstance(answer, Exception):
            raise answer
        return answer


class Folder:
    """A cache root and an output folder, that several runners share."""

    def __init__(self, path: Path) -> None:
        self.path = put_tables(path)
        self.storage = LocalStorage(path / "outputs")
        self.meter = RecordedMeter()
        self.admission: Admission | None = None  # of the next runner; by default one with a lot of room

    @asynccontextmanager
    async def runner(
        self,
        stages: Stages,
        webhook_rules: WebhookRules | None = None,
        serves: str = "wan",
        further: Mapping[str, Stages] | None = None,
        describing: StageDescription = WAN,
        describing_again: Sequence[StageDescription | Exception] = (),
        **args: Any,
    ) -> AsyncIterator[Jobs]:
        """`further`: the stages of more models."""
        if "webhook_secret" in args:
            (self.path / "webhook_secret").write_text(args["webhook_secret"])
            args["webhook_secret"] = SecretReference(file=self.path / "webhook_secret")
        job_args = JobArgs(**{"lease_s": 1, **args})

        admission = self.admission or Admission(AdmissionArgs())
        described: Any = Described(describing, describing_again)
        models = {serves: MakeAtOnce(stages.make, admission, described)} | {
            name: MakeAtOnce(each.make, Admission(AdmissionArgs()), described) for name, each in (further or {}).items()
        }
        jobs = Jobs(job_args, self.path, "app", models, self.storage, webhook_rules, self.meter)
        jobs.start()
        try:
            yield jobs
        finally:
            jobs.close()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


async def submit(jobs: Jobs, job_id: str = "video_1", n: int = 1, model: str = "wan", **how: Any) -> Job:
    ids = [job_id] if n == 1 else [f"{job_id}-{index}" for index in range(n)]
    requests = [request_of(each, seed=7 + index, model=model) for index, each in enumerate(ids)]
    return await jobs.submit("video", job_id, requests, {"prompt": "a cat"}, "", **how)


async def ended(jobs: Jobs, job_id: str = "video_1") -> Job:
    return await asyncio.wait_for(jobs.end_of(job_id, ""), WAIT_S)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def file_of(folder: Folder, job: Job) -> bytes:
    data, _ = await folder.storage.load(job.outputs[0].key)
    return data


async def truth() -> bytes:
    follower = Follower()
    follower.wants_progress = True
    media = await Stages().make(request_of("x"), follower)
    return media.files[0].data


# --- from beginning to end ---


async def test_the_metrics_say_how_jobs_end_and_how_many_there_are(folder: Folder) -> None:
    meter, stages = folder.meter, Stages()
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await until(lambda: meter.counted["triptych_jobs_ended_total"])
        stages.hold_at = 2
        await submit(jobs, "video_2")
        await stages.reached.wait()
        await jobs.cancel("video_2", "")
        await jobs.tell()
        assert meter.counted["triptych_jobs_taken_total"] == {("wan", "video"): 2}
        assert meter.counted["triptych_jobs_ended_total"] == {("wan", "completed"): 1, ("wan", "cancelled"): 1}
        assert set(meter.observed["triptych_job_seconds"]) == {("completed",), ("cancelled",)}
        assert meter.observed["triptych_job_wait_seconds"][()]
        assert {status: count for (status,), count in meter.stands_at["triptych_jobs"].items()} == {
            "queued": 0,
            "in_progress": 0,
            "completed": 1,
            "failed": 0,
            "cancelled": 1,
        }
        assert meter.stands_at["triptych_job_store_up"] == {(): 1}
    await jobs.tell()
    assert meter.stands_at["triptych_job_store_up"] == {(): 0}


async def test_a_job_is_made_stored_and_completed(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await submit(jobs)
        job = await ended(jobs)
    assert (job.status, job.progress, job.error) == ("completed", 100, None)
    assert job.timings == {"0": {"denoise": 1.5}}
    assert await file_of(folder, job) == await truth()


async def test_each_of_n_requests_has_its_file_and_its_seed(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await submit(jobs, n=3)
        job = await ended(jobs)
    assert [output.seed for output in job.outputs] == [7, 8, 9]
    assert len({output.sha256 for output in job.outputs}) == 3


async def test_no_more_jobs_run_at_a_time_than_allowed(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 1
    async with folder.runner(stages, max_running=2) as jobs:
        for number in range(4):
            await submit(jobs, f"video_{number}")
        await until(lambda: len(stages.began_at) == 2)
        await asyncio.sleep(0.2)
        assert len(stages.began_at) == 2
        assert jobs.store.count("queued") == 2
        stages.held.set()
        for number in range(4):
            assert (await ended(jobs, f"video_{number}")).status == "completed"


# --- takeover ---


async def test_a_job_goes_on_from_its_checkpoint_when_its_runner_dies(folder: Folder) -> None:
    dead, alive = Stages(), Stages()
    dead.hold_at = 6
    async with folder.runner(dead) as first:
        await submit(first)
        await dead.reached.wait()
        await until(lambda: checkpoint_step(first) == 6)
        for loop in first.runner._loops:  # the process is gone: no heartbeat, no end
            loop.cancel()
        async with folder.runner(alive) as second:
            job = await ended(second)
        assert job.takeovers == 0, "getting further clears the count"
    assert folder.meter.counted["triptych_job_takeovers_total"] == {(): 1}
    assert (dead.began_at, alive.began_at) == ([0], [6])
    assert await file_of(folder, job) == await truth()


def checkpoint_step(jobs: Jobs) -> int:
    saved = jobs.store.checkpoints("video_1")
    checkpoint = checkpoint_from_bytes(saved[0]) if saved else None
    return checkpoint.step if checkpoint else 0


async def test_what_was_stored_before_a_takeover_is_not_made_again(folder: Folder) -> None:
    dead, alive = Stages(), Stages()
    async with folder.runner(dead) as first:
        make = dead.make

        async def first_only(request: GenerationRequest, follower: Follower) -> Media:
            if request.seed == 8:
                await asyncio.Event().wait()
            return await make(request, follower)

        first.runner.models["wan"].make = first_only
        await submit(first, n=2)
        await until(lambda: first.store.get("video_1").outputs)
        for loop in first.runner._loops:
            loop.cancel()
        async with folder.runner(alive) as second:
            job = await ended(second)
    assert len(alive.began_at) == 1
    assert [(output.request, output.seed) for output in job.outputs] == [(0, 7), (1, 8)]


async def test_a_runner_that_is_stopped_gives_its_jobs_back_at_once(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    async with folder.runner(stages, lifetime_s=5) as first:
        await submit(first)
        await stages.reached.wait()
    async with folder.runner(Stages()) as second:
        assert second.store.get("video_1").takeovers == 0
        assert (await ended(second)).status == "completed"


async def test_a_job_that_ends_every_runner_is_given_up(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    stages = Stages()
    stages.failures = [RaySystemError("no memory") for _ in range(50)]
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        job = await ended(jobs)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "generation_failed"
    # Once less where its lease is over before the process has noticed the end.
    assert runner.MAX_TAKEOVERS <= len(stages.began_at) <= runner.MAX_TAKEOVERS + 1


@pytest.mark.parametrize("times", [1, runner.MAX_TAKEOVERS + 5])
async def test_a_job_whose_stages_are_away_is_tried_again_however_long_that_is(
    times: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.01)
    monkeypatch.setattr(runner, "LONGEST_PAUSE_S", 0.02)
    stages = Stages()
    stages.failures = [RayServeException("no replica") for _ in range(times)]
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        assert (await ended(jobs)).status == "completed"
    assert len(stages.began_at) == times + 1


async def test_a_job_whose_stage_cannot_reach_what_it_needs_waits_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA's place is away: the replica lives, and says so."""
    monkeypatch.setattr(runner, "POSTPONED_S", 0.01)
    away = StageUnavailableError("the adapter 'ink' cannot be fetched now")
    stages = Stages()
    stages.failures = [RayTaskError("denoise", "traceback", away).as_instanceof_cause() for _ in range(3)]  # type: ignore[no-untyped-call]
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        assert (await ended(jobs)).status == "completed"
        assert jobs.runner.models["wan"].paused_until == 0.0
    assert len(stages.began_at) == 4


async def test_no_other_job_is_begun_while_the_stages_are_away_and_the_pauses_grow(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.2)
    stages = Stages()
    stages.failures = [RayServeException("no replica") for _ in range(2)]
    began: list[float] = []
    async with folder.runner(stages, max_running=1) as jobs:
        make = jobs.runner.models["wan"].make

        async def timed(*arguments: Any) -> Media:
            began.append(time.monotonic())
            return await make(*arguments)

        jobs.runner.models["wan"].make = timed
        for job_id in ("video_1", "video_2"):
            await submit(jobs, job_id)
        for job_id in ("video_1", "video_2"):
            assert (await ended(jobs, job_id)).status == "completed"
    assert len(began) == 4
    assert began[1] - began[0] >= 0.2
    assert began[2] - began[1] >= 0.4


async def test_jobs_are_still_claimed_after_an_error_that_nobody_thought_of(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        claim, errors = jobs.store.claim, [RuntimeError("something else")]

        def fail_once(*args: Any) -> Job | None:
            if errors:
                raise errors.pop()
            return claim(*args)

        jobs.store.claim = fail_once  # type: ignore[method-assign]
        await submit(jobs)
        assert (await ended(jobs)).status == "completed"
    assert errors == []


# --- the end of a replica ---


@pytest.mark.parametrize("turns", range(3))
async def test_a_replica_ends_its_work_when_a_change_comes_at_the_same_moment(folder: Folder, turns: int) -> None:
    async with folder.runner(Stages()) as jobs:
        await asyncio.sleep(0.1)  # nothing to do: it waits for a change
        jobs.changes.notify()
        for _ in range(turns):  # of the event loop, in which the change is on its way
            await asyncio.sleep(0)
    done, pending = await asyncio.wait(jobs.runner._loops, timeout=5)
    assert (pending, [task.cancelled() for task in done]) == (set(), [True] * len(done))


async def test_a_job_that_is_being_claimed_when_its_replica_ends_is_given_back(folder: Folder) -> None:
    stages, is_claiming = Stages(), threading.Event()
    async with folder.runner(stages) as jobs:
        claim = jobs.store.claim

        def claim_slowly(*args: Any) -> Job | None:
            is_claiming.set()
            time.sleep(0.3)
            return claim(*args)

        jobs.store.claim = claim_slowly  # type: ignore[method-assign]
        await submit(jobs)
        await until(is_claiming.is_set)
    assert jobs.store.get("video_1").status == "queued"


async def test_what_is_asked_of_a_replica_that_has_ended_is_answered_with_503(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await submit(jobs)
    with pytest.raises(StageUnavailableError, match="try again"):
        await jobs.get("video_1", "")


# --- jobs whose runners died ---


def suspect(folder: Folder, *job_ids: str, deaths: int = runner.SUSPECTED) -> None:
    """As if so many runners had died with them."""
    with sqlite3.connect(folder.path / "jobs.sqlite") as database:
        for job_id in job_ids:
            database.execute("UPDATE jobs SET takeovers = ? WHERE id = ?", (deaths, job_id))
    database.close()


async def test_jobs_whose_runners_died_run_one_at_a_time_and_hold_up_nobody(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    waiting, stages = Stages(), Stages()
    waiting.hold_at = 1
    async with folder.runner(waiting, max_running=1) as before:
        for job_id in ("video_0", "video_1", "video_2", "video_3"):
            await submit(before, job_id)
        await waiting.reached.wait()
        suspect(folder, "video_1", "video_2")
    begun: list[tuple[str, set[str]]] = []
    got_further: set[str] = set()
    make = stages.make

    async def watched(request: GenerationRequest, follower: Follower) -> Media:
        begun.append((request.request_id, set(got_further)))
        if request.request_id == "video_1":
            await ended(jobs, "video_3")  # it need not wait for a suspect
        report = follower.on_progress

        def on_progress(progress: DenoisingProgress) -> None:
            got_further.add(request.request_id)
            report(progress)

        follower.on_progress = on_progress  # type: ignore[method-assign]
        return await make(request, follower)

    stages.make = watched  # type: ignore[method-assign]
    async with folder.runner(stages) as jobs:
        outcomes = [(await ended(jobs, f"video_{number}")).status for number in range(4)]
    assert outcomes == ["completed"] * 4
    (first, _), (_, further) = (each for each in begun if each[0] in ("video_1", "video_2"))
    assert first in further
    assert not folder.meter.counted["triptych_job_takeovers_total"], "they were given back, and postponed"


async def test_a_suspected_job_that_gets_further_lets_the_next_one_run(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    waiting, stages = Stages(), Stages()
    waiting.hold_at = 1
    async with folder.runner(waiting, max_running=1) as before:
        for job_id in ("video_0", "video_1", "video_2"):
            await submit(before, job_id)
        await waiting.reached.wait()
        suspect(folder, "video_1", "video_2")
    stages.hold_at = 5
    async with folder.runner(stages) as jobs:
        await until(lambda: len(stages.began_at) == 3)  # video_1 is held at its fifth step
        stages.held.set()
        assert (await ended(jobs, "video_2")).status == "completed"


class Stuck(Stages):
    """Gets nowhere until `held` is set."""

    async def make(self, request: GenerationRequest, follower: Follower) -> Media:
        self.reached.set()
        await self.held.wait()
        return await super().make(request, follower)


@pytest.mark.parametrize("deaths", [runner.SUSPECTED, runner.MOST_SUSPECTED])
async def test_a_suspected_job_holds_up_one_of_another_model_only_where_it_was_suspected_often(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    async with folder.runner(Stages(), further={"ltx": Stages()}) as before:
        before.runner._loops[0].cancel()  # claims nothing
        for number, model in enumerate(("wan", "wan", "ltx")):
            await submit(before, f"video_{number}", model=model)
        suspect(folder, "video_0", deaths=deaths)
        suspect(folder, "video_1", "video_2")
    stuck, free = Stuck(), Stages()
    async with folder.runner(stuck, further={"ltx": free}) as jobs:
        await stuck.reached.wait()
        if deaths == runner.SUSPECTED:
            assert (await ended(jobs, "video_2")).status == "completed"
        await asyncio.sleep(0.15)
        assert free.began_at == ([0] if deaths == runner.SUSPECTED else [])
        assert (await jobs.get("video_1", "")).progress == 0
        stuck.held.set()
        assert {(await ended(jobs, f"video_{number}")).status for number in range(3)} == {"completed"}


def test_a_job_that_is_to_be_tried_alone_gets_its_turn_while_younger_suspects_come() -> None:
    def suspected(job_id: str, takeovers: int, model: str) -> Any:
        return SimpleNamespace(id=job_id, takeovers=takeovers, asked=SimpleNamespace(model=model))

    now = 0.0
    jobs = runner.SuspectedJobs(lambda: now)
    often = suspected("often", runner.MOST_SUSPECTED, "wan")
    younger = [suspected(f"younger_{number}", runner.SUSPECTED, "ltx") for number in range(3)]
    assert jobs.may_begin(younger[0])
    assert not jobs.may_begin(often)
    jobs.passed("younger_0")
    assert not jobs.may_begin(younger[1])
    assert jobs.may_begin(suspected("innocent", 0, "ltx"))
    assert jobs.may_begin(often)
    jobs.passed("often")
    assert jobs.may_begin(younger[1])
    assert not jobs.may_begin(often)  # and comes no more: it was cancelled
    jobs.passed("younger_1")
    now += runner.KEPT_FREE_S
    assert jobs.may_begin(younger[2])


# --- beside callers who wait ---


async def test_jobs_whose_callers_wait_at_another_replica_are_no_part_of_the_share_of_jobs(folder: Folder) -> None:
    async with folder.runner(Stages()) as there:
        there.runner._loops[0].cancel()  # claims nothing
        await submit(there, "video_1", is_awaited=True)
        await submit(there, "video_2")
        folder.admission = here = Admission(AdmissionArgs(max_pending=1))
        async with folder.runner(Stages()) as jobs:
            jobs.runner._loops[0].cancel()
            await jobs.ledger.look()
            assert here.jobs_are_behind(), "a caller waits, and no job is at the stages"
            jobs.ledger.begun(await jobs.get("video_1", ""))
            assert here.jobs_are_behind()
            jobs.ledger.begun(await jobs.get("video_2", ""))
            assert not here.jobs_are_behind()
            await submit(jobs, "video_3", is_awaited=True)  # the caller of another replica takes no place of this one's


class InTurn(Stages):
    """Makes one request after another, in the order in which they come; each when the runner has taken its jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Lock()
        self.nothing_to_take = asyncio.Event()
        self.made: list[str] = []

    async def make(self, request: GenerationRequest, follower: Follower) -> Media:
        async with self.turn:
            self.nothing_to_take.clear()
            await self.nothing_to_take.wait()
        self.made.append(request.request_id)
        return Media((MediaFile(b"made", "video/mp4", 32, 32, 9, 16.0),), {"denoiser_forwards": 1.0})

    def watch(self, store: JobStore) -> None:
        loop, claim = asyncio.get_running_loop(), store.claim

        def watched(*how: Any) -> Job | None:
            job = claim(*how)
            if job is None:
                loop.call_soon_threadsafe(self.nothing_to_take.set)
            return job

        store.claim = watched  # type: ignore[method-assign]


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 8, 12), (0.0, 0, 3)])
async def test_jobs_have_their_share_of_the_stages_while_more_callers_wait_than_can_be_served(
    folder: Folder, share: float, least: int, most: int
) -> None:
    stages = InTurn()
    folder.admission = Admission(AdmissionArgs(jobs_share=share))
    async with folder.runner(stages, max_running=1, lease_s=60) as jobs:
        making = jobs.models["wan"]

        async def caller(number: int) -> None:
            while True:  # whoever was served comes again at once
                await asyncio.gather(*await making.start([request_of(f"call_{number}")], "", [Follower()]))

        callers = [asyncio.create_task(caller(number)) for number in range(8)]
        for number in range(24):
            await submit(jobs, f"video_{number}")
        stages.watch(jobs.store)
        await until(lambda: len(stages.made) >= 36)
        for each in callers:
            each.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        newest = stages.made[16:36]  # those have gone that came before the jobs
        assert least <= sum(each.startswith("video") for each in newest) <= most, newest


# --- ends ---


@pytest.mark.parametrize(
    ("now", "code", "sentence"),
    [
        (TEXT_TO_IMAGE, "not_supported", "makes images, it cannot make videos"),
        (description("LTXPipeline", media_kind="video", required=("image",)), "missing_required", "image is required"),
        (
            dataclasses.replace(WAN, parameters={"prompt": None}),
            "not_supported",
            "num_inference_steps is not supported: WanPipeline does not take it",
        ),
    ],
)
async def test_a_job_for_which_its_model_has_become_another_one_fails_with_a_sentence(
    folder: Folder, now: StageDescription, code: str, sentence: str
) -> None:
    stages = Stages()
    async with folder.runner(Stages()) as before:
        before.runner._loops[0].cancel()  # claims nothing
        await submit(before)
    async with folder.runner(stages, describing=now) as jobs:
        job = await ended(jobs)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"].startswith(code)
    assert sentence in job.error["message"]
    assert not stages.began_at


@pytest.mark.parametrize("unknown", [OtherVersionError("an update"), StageUnavailableError("no answer")])
async def test_a_replica_of_before_an_update_fails_no_job_that_the_later_model_takes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, unknown: Exception
) -> None:
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    stages, earlier = Stages(), dataclasses.replace(WAN, parameters={"prompt": None})
    async with folder.runner(stages, describing=earlier, describing_again=[unknown, unknown, WAN]) as jobs:
        await submit(jobs)
        assert (await ended(jobs)).status == "completed"
    assert stages.began_at == [0]


async def test_a_job_of_no_model_here_is_left_where_the_store_is_away(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve_app.jobs.store.UNSERVED_S", 0.1)
    async with folder.runner(Stages(), serves="wan") as jobs:
        jobs.runner._loops[0].cancel()  # claims nothing
        await submit(jobs, "video_1")
    read, failures = JobStore.input_images, [StageUnavailableError("too much waits")]

    def away_once(store: JobStore, job_id: str) -> list[bytes]:
        if failures:
            raise failures.pop()
        return read(store, job_id)

    monkeypatch.setattr(JobStore, "input_images", away_once)
    monkeypatch.setattr(runner, "POSTPONED_S", 0.05)
    async with folder.runner(Stages(), serves="wan-v2") as jobs:
        job = await ended(jobs, "video_1")
    assert (job.status, job.error and job.error["code"]) == ("failed", "model_not_found")
    assert "KeyError" not in caplog.text


async def test_a_failure_says_the_sentence_and_the_code_of_the_synchronous_route(folder: Folder) -> None:
    stages = Stages()
    stages.failures = [GenerationFailedError("the replicas died 3 times"), InvalidRequestError("too wide", "size")]
    async with folder.runner(stages, max_running=1) as jobs:
        await submit(jobs)
        await submit(jobs, "video_2")
        first, second = await ended(jobs), await ended(jobs, "video_2")
    assert first.error is not None
    assert second.error is not None
    assert (first.status, first.error["code"], first.error["status"]) == ("failed", "generation_failed", 500)
    assert (second.error["code"], second.error["message"], second.error["status"]) == ("invalid_value", "too wide", 400)


async def test_an_unexpected_error_gives_nothing_of_the_inside_away(folder: Folder) -> None:
    stages = Stages()
    stages.failures = [RuntimeError("/secret/path")]
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        job = await ended(jobs)
    assert job.error is not None
    assert job.error["code"] == "internal_error"
    assert "secret" not in json.dumps(job.error)


async def test_cancelling_stops_the_work_and_leaves_no_file(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 2
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await stages.reached.wait()
        job = await jobs.cancel("video_1", "")
        await until(lambda: stages.cancelled == 1 and not jobs.runner.running)
    assert job.status == "cancelled"
    assert not list((folder.path / "outputs").rglob("*.mp4"))


async def test_a_job_cancelled_through_another_replica_stops_too(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 2
    async with folder.runner(stages) as first, folder.runner(Stages(), max_running=1) as second:
        second.runner._loops[0].cancel()  # claims nothing
        await submit(first)
        await stages.reached.wait()
        await second.cancel("video_1", "")
        await until(lambda: stages.cancelled == 1)


async def test_deleting_removes_the_file_and_the_record(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await submit(jobs)
        job = await ended(jobs)
        await jobs.delete("video_1", "")
        with pytest.raises(JobNotFoundError):
            await jobs.get("video_1", "")
        with pytest.raises(ObjectNotFoundError):
            await folder.storage.load(job.outputs[0].key)


async def test_an_expired_job_is_removed_with_its_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CLEANING_S", 0.02)
    async with folder.runner(Stages(), lifetime_s=0.01) as jobs:
        await submit(jobs)
        await until(lambda: jobs.runner.storage and not jobs.store.page("", None, None, 1, "asc")[0])
    assert not list((folder.path / "outputs").rglob("*.mp4"))


# --- storage that fails ---


class Full(LocalStorage):
    """A volume that is full until it is told otherwise."""

    is_full = True

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        if self.is_full:
            raise StorageError("no space left on device")
        return await super().store(key, data, content_type, metadata)


async def test_a_full_volume_fails_no_job_and_takes_no_checkpoint(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.storage.outputs.FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("serve_app.storage.outputs.LONGEST_PAUSE_S", 0.02)
    folder.storage = full = Full(folder.path / "outputs")
    async with folder.runner(Stages()) as jobs:
        for number in range(3):
            await submit(jobs, f"video_{number}")
        await until(lambda: all(waits(jobs, f"video_{number}") for number in range(3)))
        assert all(jobs.store.checkpoints(f"video_{number}") for number in range(3))
        full.is_full = False
        assert [(await ended(jobs, f"video_{number}")).status for number in range(3)] == ["completed"] * 3
        events = jobs.store.story("video_0", 0).events
    assert [event.kind for event in events if event.kind in ("waiting", "stored")] == ["waiting", "stored"]


async def test_what_waits_for_storage_is_made_from_its_checkpoint_by_another_when_its_replica_ends(
    folder: Folder,
) -> None:
    first, second = Stages(), Stages()
    folder.storage = full = Full(folder.path / "outputs")
    async with folder.runner(first) as jobs:
        await submit(jobs)
        await until(lambda: waits(jobs, "video_1"))
    full.is_full = False
    async with folder.runner(second) as jobs:
        assert (await ended(jobs)).status == "completed"
    assert second.began_at > [0]


SAID = ("in_progress", "waiting", "begun")


async def test_a_job_that_no_denoiser_takes_up_tells_that_it_waits_until_one_does(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LATE_S", 0.0)
    taken_up = asyncio.Event()

    class Busy(Stages):
        async def make(self, request: GenerationRequest, follower: Follower) -> Media:
            await taken_up.wait()
            follower.on_begin()
            return await super().make(request, follower)

    async with folder.runner(Busy()) as jobs:
        await submit(jobs)
        await until(lambda: waits(jobs, "video_1"))
        taken_up.set()
        await ended(jobs)
        told = [event for event in jobs.store.story("video_1", 0).events if event.kind in SAID]
    told_as = [(event.kind, event.data.get("for")) for event in told]
    assert told_as == [("in_progress", None), ("waiting", "denoiser"), ("begun", None)]


def waits(jobs: Jobs, job_id: str) -> bool:
    return any(event.kind == "waiting" for event in jobs.store.story(job_id, 0).events)


# --- other names of the model ---


async def test_jobs_of_an_earlier_key_are_found_with_their_idempotency_keys(folder: Folder) -> None:
    key = IdempotencyKey("key", "a" * 64)
    for model, job_id in (("wan-v1", "video_1"), ("wan/v2", "video_2")):
        earlier = JobStore(open_database(None, folder.path), f"app/{model}")
        earlier.add(NewJob(job_id, "video", rows_of(1, job_id)), key)
        earlier.close()
    other = JobStore(open_database(None, folder.path), "app2/wan")
    other.add(NewJob("video_3", "video", rows_of(1, "video_3")))
    other.close()
    async with folder.runner(Stages(), serves=rows_of(1, "video_1")[0]["work"]["model"]) as jobs:
        assert (await submit(jobs, "video_4", key=key)).id == "video_2", "the latest that the key was used for"
        assert [(await ended(jobs, f"video_{number}")).status for number in (1, 2)] == ["completed"] * 2
        with pytest.raises(JobNotFoundError):
            await jobs.get("video_3", "")


async def test_a_job_of_a_model_that_is_no_longer_served_ends_with_a_sentence(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.store.UNSERVED_S", 0.1)
    stages = Stages()
    async with folder.runner(Stages(), serves="wan") as jobs:
        await submit(jobs, "video_1")
        made = await ended(jobs)
        jobs.runner._loops[0].cancel()  # claims nothing more
        await submit(jobs, "video_2")
    async with folder.runner(stages, serves="wan-v2") as jobs:
        job = await ended(jobs, "video_2")
        assert await file_of(folder, await jobs.get("video_1", "")) == await file_of(folder, made)
    assert (job.status, job.error and job.error["code"], stages.began_at) == ("failed", "model_not_found", [])
    assert job.error is not None
    assert "'wan'" in job.error["message"]


async def test_replicas_of_the_old_and_the_new_model_take_each_their_own_jobs(folder: Folder) -> None:
    old, new = Stages(), Stages()
    async with folder.runner(new, serves="wan-v2"), folder.runner(old, serves="wan", max_running=1) as jobs:
        for number in range(3):
            await submit(jobs, f"video_{number}")
        assert [(await ended(jobs, f"video_{number}")).status for number in range(3)] == ["completed"] * 3
    assert (len(old.began_at), len(new.began_at)) == (3, 0)


# --- a job store that is away for a moment ---


async def test_a_job_that_has_begun_stays_so_and_loses_nothing_where_the_store_was_away_for_a_moment(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages()
    warning = RequestWarning("text_cut", "prompt", "the end is not read")

    async def make(request: GenerationRequest, follower: Follower) -> Media:
        follower.on_begin()
        follower.on_warning(warning)
        stages.hold_at = 1
        return await Stages.make(stages, request, follower)

    async with folder.runner(stages) as jobs:
        jobs.runner.models["wan"].make = make
        failed = []
        for name in ("save_beginning", "save_warnings", "save_progress", "save_event", "save_checkpoint"):
            monkeypatch.setattr(jobs.store, name, failing_once(name, getattr(jobs.store, name), failed))
        await submit(jobs, previews=1, limits=TimeLimits(start_s=3600))
        await until(lambda: checkpoint_step(jobs) == 1)
        with jobs.store._engine.begin() as connection:
            start_by = connection.execute(sa.select(tables.jobs.c.start_by)).scalar_one()
        stages.held.set()
        job = await ended(jobs)
        kinds = await kinds_of(jobs, "video_1")
    assert (job.status, job.warnings) == ("completed", (warning,)), job.error
    assert start_by is None, "it is not held against its time to begin"
    assert len(failed) == 5
    assert "preview" in kinds


def failing_once(name: str, method: Callable[..., Any], failed: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if name not in failed:
            failed.append(name)
            raise JobStoreAwayError("away")
        return method(*args)

    return call


# --- followers ---


async def test_many_followers_ask_the_store_once_and_wake_for_their_own_job_only(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    async with folder.runner(stages, max_running=1) as jobs:
        looks = []
        news = jobs.store.news

        def count(seen: dict[str, int]) -> News:
            looks.append(seen)
            return news(seen)

        jobs.store.news = count  # type: ignore[method-assign,assignment]
        await submit(jobs, "video_1")
        await stages.reached.wait()
        await submit(jobs, "video_2")
        followers = [asyncio.create_task(kinds_of(jobs, "video_1")) for _ in range(100)]
        waiting = [asyncio.create_task(kinds_of(jobs, "video_2")) for _ in range(100)]
        await until(lambda: sum(len(each.readers) for each in jobs.watch._jobs.values()) == 200)
        await until(lambda: len(looks) > 2 and len(looks[-1]) == 2)
        num_looks = len(looks)
        await asyncio.sleep(1.0)
        assert len(looks) - num_looks <= 3, "nothing happens, so the store is asked twice a second, for all"
        stages.held.set()
        told = await asyncio.gather(*followers, *waiting)
    assert {tuple(kinds[-1:]) for kinds in told} == {("completed",)}
    assert len({tuple(filter(None, kinds)) for kinds in told[:100]}) == 1, "but for what keeps a connection alive"
    assert jobs.watch._jobs == {}


async def kinds_of(jobs: Jobs, job_id: str, after: int = 0) -> list[str | None]:
    return [event.kind async for event in jobs.events(job_id, after)]


async def test_followers_and_those_who_wait_outlast_a_store_that_is_away(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.events.AWAY_S", 0.05)
    stages = Stages()
    stages.hold_at = 3
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        follower = asyncio.create_task(kinds_of(jobs, "video_1"))
        waiting = asyncio.create_task(ended(jobs))
        await stages.reached.wait()
        news, failures = jobs.store.news, [OperationalError("", {}, Exception("away")) for _ in range(3)]

        def fail_at_first(seen: dict[str, int]) -> News:
            if failures:
                raise failures.pop()
            return news(seen)

        jobs.store.news = fail_at_first  # type: ignore[method-assign,assignment]
        stages.held.set()
        assert (await follower)[-1] == "completed"
        assert (await waiting).status == "completed"
    assert failures == []


async def test_a_follower_from_beyond_the_last_event_hears_the_end(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await stages.reached.wait()
        following = asyncio.create_task(kinds_of(jobs, "video_1", after=10**6))
        await asyncio.sleep(0.1)
        await jobs.delete("video_1", "")
        async with asyncio.timeout(WAIT_S):
            assert (await following)[-1] == "deleted"


# --- progress and events ---


async def read_events(jobs: Jobs, after: int = 0) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    async with asyncio.timeout(WAIT_S):
        async for block in sse_of_job(jobs.events("video_1", after)):
            lines = dict(line.split(": ", 1) for line in block.decode().splitlines() if ": " in line and line[0] != ":")
            if "id" in lines:
                events.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return events


async def test_events_tell_the_whole_story_with_progress_that_never_falls(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await submit(jobs, n=2)
        events = await read_events(jobs)
    kinds = [kind for _, kind, _ in events]
    steps = [data["progress"] for _, kind, data in events if kind == "step"]
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
    assert [kinds[0], kinds[1], kinds[-1]] == ["queued", "in_progress", "completed"]
    assert kinds.count("stored") == 2
    assert steps == sorted(steps)
    assert steps
    assert max(steps) < 100
    assert events[0][2]["position"] == 0


async def test_previews_are_small_pictures_among_the_events(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        await jobs.submit("video", "video_1", [request_of("video_1")], {"prompt": "a cat"}, "", previews=2)
        previews = [data for _, kind, data in await read_events(jobs) if kind == "preview"]
    assert [preview["step"] for preview in previews] == [1, 2]
    for preview in previews:
        shown = Image.open(io.BytesIO(base64.b64decode(preview["b64_json"])))
        assert (shown.format, shown.size, preview["size"]) == ("JPEG", (256, 64), "256x64")


async def test_a_reader_who_comes_back_gets_what_was_missed_and_nothing_twice(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 5
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await stages.reached.wait()
        seen = 0
        async for block in sse_of_job(jobs.events("video_1", 0)):
            if block.startswith(b"id: "):
                seen = int(block.split(b"\n")[0][4:])
            if seen == 2:
                break
        stages.held.set()
        await ended(jobs)
        rest, whole = await read_events(jobs, seen), await read_events(jobs)
    assert rest == whole[2:]


async def test_a_waiting_jobs_reader_hears_when_it_moves_up(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 1
    async with folder.runner(stages, max_running=1) as jobs:
        await submit(jobs, "video_0")
        await stages.reached.wait()
        await submit(jobs, "video_between")
        await submit(jobs, "video_1")
        positions = []
        async for block in sse_of_job(jobs.events("video_1", 0)):
            if b"event: queued" in block:
                positions.append(json.loads(block.split(b"data: ")[1])["position"])
                if positions == [1]:
                    await jobs.cancel("video_between", "")
                else:
                    break
        stages.held.set()
    assert positions == [1, 0]


# --- idempotency ---


async def test_the_same_key_makes_one_job_and_another_body_a_conflict(folder: Folder) -> None:
    stages = Stages()
    async with folder.runner(stages) as jobs:
        first = await submit(jobs, "video_1", key=IdempotencyKey("key", "a" * 64))
        again = await submit(jobs, "video_2", key=IdempotencyKey("key", "a" * 64))
        with pytest.raises(ConflictError):
            await submit(jobs, "video_3", key=IdempotencyKey("key", "b" * 64))
        await ended(jobs)
    assert (first.id, again.id, len(stages.began_at)) == ("video_1", "video_1", 1)


# --- webhooks ---


async def test_the_end_of_a_job_is_told_to_the_callers_address(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "PAUSE_S", 0.02)
    receiver = Receiver(500, 200)
    async with web_server(receiver.answer) as url:
        rules = WebhookRules(allow_private=True, first_wait_s=0)
        async with folder.runner(Stages(), webhook_secret="secret", webhook_rules=rules) as jobs:
            await submit(jobs, webhook_url=f"{url}/hook")
            await ended(jobs)
            await until(lambda: len(receiver.received) == 2)
    headers, body = receiver.received[-1]
    client = openai.OpenAI(api_key="none", webhook_secret="secret")
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("video.completed", "video_1")


async def test_a_webhook_is_refused_where_nothing_signs_it(folder: Folder) -> None:
    async with folder.runner(Stages()) as jobs:
        with pytest.raises(NotSupportedError, match="webhook_secret"):
            await submit(jobs, webhook_url="https://a.example/")
    async with folder.runner(Stages(), webhook_secret="secret") as jobs:
        with pytest.raises(InvalidRequestError, match="webhook_url"):
            await submit(jobs, webhook_url="http://127.0.0.1/")


# --- requests and checkpoints as bytes ---


# --- jobs in the ledger ---


async def test_jobs_count_in_the_ledger_of_every_replica_until_they_end(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    folder.admission = here = Admission(AdmissionArgs())
    async with folder.runner(stages, max_running=1) as jobs:
        await submit(jobs, "video_1", n=2)
        await submit(jobs, "video_2")
        await stages.reached.wait()
        assert here.num_pending == 3
        folder.admission = there = Admission(AdmissionArgs())
        async with folder.runner(Stages(), max_running=1):
            await until(lambda: there.num_pending >= 2)
            await until(lambda: here.num_pending == there.num_pending == 2)  # video_2 was made there
            stages.held.set()
            await ended(jobs)
            await until(lambda: here.num_pending == there.num_pending == 0)


async def test_jobs_of_before_a_restart_still_count(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    async with folder.runner(stages, max_running=1) as jobs:
        await submit(jobs, "video_1")
        await submit(jobs, "video_2")
        await stages.reached.wait()
    later = Stages()
    later.hold_at = 5
    folder.admission = Admission(AdmissionArgs(max_job_queue_s=12, first_guess_s=5))
    async with folder.runner(later, max_running=1) as jobs:
        await later.reached.wait()
        await until(lambda: jobs.models["wan"].admission.queue_s(with_waiting_jobs=False) == 5)
        assert jobs.models["wan"].admission.queue_s() == 10
        with pytest.raises(OverloadedError) as refused:
            await submit(jobs, "video_3")
        assert refused.value.retry_after_s == 3


async def test_jobs_of_a_model_that_left_take_no_room_of_another(folder: Folder) -> None:
    async with folder.runner(Stages(), serves="wan") as before:
        before.runner._loops[0].cancel()  # claims nothing
        await submit(before)
    folder.admission = Admission(AdmissionArgs())
    async with folder.runner(Stages(), serves="ltx") as jobs:
        await jobs.ledger.look()
        assert folder.admission.num_pending == 0
        assert (await jobs.counts())["queued"] == 1


async def test_what_jobs_took_is_learned(folder: Folder) -> None:
    folder.admission = Admission(AdmissionArgs(first_guess_s=5))
    stages = Stages()
    stages.seconds = {"denoiser_forwards": 20.0, "decode": 1.0}
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await ended(jobs)
        assert folder.admission.costs.predict((32, 32, 1), STEPS) == pytest.approx(21)


async def test_a_cancelled_job_makes_room_at_once(folder: Folder) -> None:
    stages = Stages()
    stages.hold_at = 3
    folder.admission = Admission(AdmissionArgs())
    async with folder.runner(stages) as jobs:
        await submit(jobs)
        await stages.reached.wait()
        await jobs.cancel("video_1", "")
        assert folder.admission.num_pending == 0
        await asyncio.sleep(0.1)
        assert folder.admission.num_pending == 0


# --- rows of other versions, damaged ones ---

ROWS = Path(__file__).with_name("rows")


def rows_of(version: int, job_id: str) -> list[dict[str, Any]]:
    """A video as that version stored it: the second request of its file."""
    text = (ROWS / f"requests_v{version}.json").read_text(encoding="utf-8").replace("job_2", job_id)
    rows: list[dict[str, Any]] = json.loads(text)
    return rows[1:]


@pytest.mark.parametrize("version", [0, 1])
async def test_a_job_that_another_version_stored_is_made(folder: Folder, version: int) -> None:
    rows = rows_of(version, "video_1")
    async with folder.runner(Stages(), serves=rows[0].get("work", rows[0])["model"]) as jobs:
        jobs.store.add(NewJob("video_1", "video", rows), None)
        job = await ended(jobs)
        assert (job.status, job.asked.seed) == ("completed", 7)


async def test_a_job_whose_row_cannot_be_read_fails_by_itself_and_holds_up_no_other(folder: Folder) -> None:
    [row] = rows_of(1, "video_1")
    del row["work"]["seed"]
    async with folder.runner(Stages()) as jobs:
        jobs.store.add(NewJob("video_1", "video", [row]), None)
        await submit(jobs, "video_2")
        bad, good = await ended(jobs, "video_1"), await ended(jobs, "video_2")
    assert (bad.status, good.status) == ("failed", "completed")
    assert bad.error is not None
    assert "seed" in bad.error["message"]


@pytest.mark.parametrize("cut", [0, 20, -1])
async def test_a_cut_checkpoint_means_start_again_with_the_same_bytes(folder: Folder, cut: int) -> None:
    stages, alive = Stages(), Stages()
    stages.hold_at = 3
    async with folder.runner(stages) as first:
        await submit(first)
        await stages.reached.wait()
        await until(lambda: checkpoint_step(first) == 3)
    with sqlite3.connect(folder.path / "jobs.sqlite") as database:
        [(data,)] = database.execute("SELECT data FROM job_checkpoints").fetchall()
        database.execute("UPDATE job_checkpoints SET data = ?", (data[:cut],))
    database.close()
    async with folder.runner(alive) as second:
        job = await ended(second)
    assert (alive.began_at, job.status) == ([0], "completed")
    assert await file_of(folder, job) == await truth()
