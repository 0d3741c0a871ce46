"""Runs jobs in an ingress replica: claims them, keeps their leases, saves what must outlive the replica.

A job is interrupted by nothing but its caller: when the process dies, the lease ends and another runner goes
on from the last saved checkpoint; what had been stored is not made again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from sqlalchemy.exc import SQLAlchemyError

from deployments import tracing
from deployments.errors import ModelNotFoundError, OtherVersionError, StageUnavailableError, StorageError
from deployments.messages import Checkpoint, DenoisingProgress, GenerationRequest, Media, MediaFile, RequestWarning
from deployments.metrics.meter import NO_METER, Meter
from serve_app.errors import (
    ErrorReport,
    JobNotFoundError,
    JobStoreAwayError,
    LeaseLostError,
    original_error,
    report_error,
)
from serve_app.jobs.codec import (
    checkpoint_from_bytes,
    checkpoint_to_bytes,
    error_to_json,
    previews_from_json,
    requests_from_json,
    trace_from_json,
)
from serve_app.jobs.events import JobWatch
from serve_app.jobs.records import Event, Job, Output, Status
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import Changes, StoreThreads, wait_for_change
from serve_app.making.follower import Follower, Make
from serve_app.storage.base import StorageBackend
from serve_app.storage.outputs import store_media_in_the_end
from serve_app.storage.previews import small_picture

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between looks for jobs that other processes have added or left
HEARTBEATS_PER_LEASE = 5
WRITE_PAUSE_S = 0.1  # at least, between two writes of a job's progress
WRITE_SHARE = 0.1  # of the time that saving progress and checkpoints may take
LATE_S = 2.0  # from when a request is begun until its caller is told that no denoiser has taken it up
POSTPONED_S = 5.0  # before a job is tried again whose stages were not there; doubled while they are not
LONGEST_PAUSE_S = 40.0
CLEANING_S = 30.0
DENOISING_SHARE = 0.95  # of a request's progress; the rest is decoding and storing
PATIENCE_S = 600.0  # that a job waits, without getting further, for a device that is full of other work
SUSPECTED = 2  # takeovers without getting further: the job may be what its runners died of
MOST_SUSPECTED = 6  # from here on none of another model is tried beside it, so that an innocent one is not given up
MOST_AWAITED = 200  # jobs whose callers wait, beside max_running: admission bounds them as it does other requests
MOST_BESIDE_CALLERS = 32  # jobs of a model beyond max_running, for their share beside callers; each is held in memory
KEPT_FREE_S = 3 * POSTPONED_S  # for such a one, since it last came
MAX_TAKEOVERS = 10  # without getting further: a job that always ends its runner is given up

AWAY = (RayServeException, StageUnavailableError)  # the stages are not there: the job has no part in it
TRANSIENT = (*AWAY, RayError)
STORE_FAILED = (JobStoreAwayError, SQLAlchemyError)


class Ledger(Protocol):
    """What is told of each job that runs here, and says whether more of them should."""

    def begun(self, job: Job) -> None: ...

    def made(self, job: Job, request: int, media: Media) -> None:
        """`request`: its place in the job."""

    def ended(self, job_id: str) -> None:
        """It runs here no more, and may be given back."""

    def are_behind(self, model: str) -> bool:
        """Whether jobs of this model that nobody waits for have less than their share while callers wait."""


@dataclass
class RunningJob:
    """How far a job is, until the writer has saved it."""

    job: Job
    shares: list[float]  # of each of its requests, how much is done: 0..1
    step: dict[str, Any] | None = None  # the latest, not yet saved
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)  # the latest, not yet saved
    has_begun: bool = False  # not yet saved
    previews: list[tuple[int, int, MediaFile]] = field(default_factory=list)  # request, step, picture; not yet saved
    warnings: list[RequestWarning] = field(default_factory=list)  # not yet saved
    # request, what it waits for (None: its turn has come), and about how many seconds; not yet saved
    waits: list[tuple[int, str | None, float | None]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)  # events stand in the order in which they happened

    @property
    def progress(self) -> int:
        return min(99, int(100 * sum(self.shares) / len(self.shares)))


class JobFollower(Follower):
    """Hears of one of a job's requests, so that what must outlive this process is saved."""

    wants_progress = True
    patience_s = PATIENCE_S

    def __init__(self, running: RunningJob, request: int, previews: int, resume_from: Checkpoint | None) -> None:
        self.running = running
        self.request = request  # its place in the job
        self.previews = previews
        self.resume_from = resume_from
        self._waits_for: str | None = None
        self._late = asyncio.get_running_loop().call_later(LATE_S, self._is_late)

    def on_begin(self) -> None:
        self.end()
        if self._waits_for in ("denoiser", "model"):
            self.running.waits.append((self.request, None, None))
        self._waits_for = None
        self.running.has_begun = True
        self.running.changed.set()

    def on_wait(self, what_for: str, about_s: float | None = None) -> None:
        """Told once, until it gets further."""
        if self._waits_for != what_for:
            self._waits_for = what_for
            self.running.waits.append((self.request, what_for, about_s))
            self.running.changed.set()

    def _is_late(self) -> None:
        if self._waits_for is None:
            self.on_wait("denoiser")

    def end(self) -> None:
        """It waits for no denoiser any more."""
        self._late.cancel()

    def on_progress(self, progress: DenoisingProgress) -> None:
        running, num_steps = self.running, progress.num_steps
        self._waits_for = None
        running.shares[self.request] = DENOISING_SHARE * progress.step / max(1, num_steps)
        running.step = {"request": self.request, "step": progress.step, "num_steps": num_steps, "eta_s": progress.eta_s}
        running.changed.set()

    def on_warning(self, warning: RequestWarning) -> None:
        self.running.warnings.append(warning)
        self.running.changed.set()

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.running.checkpoints[self.request] = checkpoint
        self.running.changed.set()

    def on_preview(self, step: int, media: Media) -> None:
        self.running.previews += [(self.request, step, file) for file in media.files]
        self.running.changed.set()


@dataclass
class ModelWork:
    """How a model's jobs are made, and whether its stages were away."""

    make: Make
    paused_until: float = 0.0  # time.monotonic()
    pause_s: float = 0.0

    def pause(self) -> float:
        """No job of it is begun for so many seconds, twice as many as the time before if none was made in between."""
        if time.monotonic() >= self.paused_until:
            self.pause_s = min(LONGEST_PAUSE_S, 2 * self.pause_s or POSTPONED_S)
            self.paused_until = time.monotonic() + self.pause_s
        return self.pause_s


class SuspectedJobs:
    """Those that may be what their runners died of: of each model one is tried at a time, until it gets further.

    One that was suspected often is tried beside none of another model either: each end of this process is then its own.
    While such a one comes again and again no other is begun, so that its turn comes.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._tried: dict[str, Job] = {}  # by model
        self._waits_alone: str | None = None  # a job that was suspected often
        self._waits_until = 0.0  # it may have been cancelled, or be tried by another process

    def may_begin(self, job: Job) -> bool:
        """Whether the job, if it is suspected, may be tried now; then it is the one that is tried."""
        if job.takeovers < SUSPECTED:
            return True
        is_kept_free = self._waits_alone is not None and self._monotonic() < self._waits_until
        if is_kept_free and self._waits_alone != job.id:
            return False
        tried = self._tried.values()
        alone = max(each.takeovers for each in (job, *tried)) >= MOST_SUSPECTED
        if job.asked.model in self._tried or (alone and tried):
            if job.takeovers >= MOST_SUSPECTED:
                self._waits_alone, self._waits_until = job.id, self._monotonic() + KEPT_FREE_S
            return False
        self._waits_alone = None
        self._tried[job.asked.model] = job
        return True

    def passed(self, job_id: str) -> None:
        """It has got further, or has ended: the next one may be tried."""
        self._tried = {model: job for model, job in self._tried.items() if job.id != job_id}


class JobRunner:
    """Runs up to `max_running` jobs of each model at a time, and those whose callers wait; while callers wait, as many
    more as have their share of the work.

    `name` is unlike that of any other runner, ever.
    """

    def __init__(
        self,
        store: JobStore,
        threads: StoreThreads,
        leases: StoreThreads,
        changes: Changes,
        watch: JobWatch,
        makes: Mapping[str, Make],
        storage: StorageBackend,
        name: str,
        ledger: Ledger,
        max_running: int = 8,
        lease_s: float = 15.0,
        meter: Meter = NO_METER,
    ) -> None:
        """`leases`: threads for what must not wait for other work. `makes`: by the models whose jobs can be made."""
        self.store = store
        self.threads = threads
        self.leases = leases
        self.changes = changes
        self.watch = watch
        self.models = {name: ModelWork(make) for name, make in makes.items()}
        self.storage = storage
        self.name = name
        self.max_running = max_running
        self.lease_s = lease_s
        self.ledger = ledger
        self.meter = meter
        self.running: dict[str, asyncio.Task[None]] = {}
        self._model_of: dict[str, str] = {}  # by the ids of those that run
        self._suspected = SuspectedJobs()
        self._loops: list[asyncio.Task[None]] = []

    def start(self, *more_work: Callable[[], Awaitable[None]]) -> None:
        """Begin, apart from the HTTP request (if any) in whose course this is called; `more_work` is repeated too."""
        loop = asyncio.get_running_loop()
        for work in (self._claim_jobs, self._keep_leases, self._remove_expired, *more_work):
            # An empty context: Serve cancels what belongs to the context of a request that has ended.
            self._loops.append(loop.create_task(self._forever(work), context=contextvars.Context()))

    def stop(self) -> None:
        """End all work; when the leases are released, other runners go on from the last checkpoints."""
        for task in [*self._loops, *self.running.values()]:
            task.cancel()

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        """The store may be away for a while; the jobs go on, and so does this."""
        while True:
            try:
                await work()
            except Exception:  # if this ended, jobs would wait for ever in a replica that looks healthy
                logger.exception("the work on jobs failed; trying again")
                await asyncio.sleep(POLL_S)

    # --- which jobs ---

    async def _claim_jobs(self) -> None:
        change = self.changes.next()
        await self.leases.run(self.store.look_at_leases)  # also where nothing is claimed: only what was seen counts
        while len(self.running) < (self.max_running + MOST_BESIDE_CALLERS) * len(self.models) + MOST_AWAITED:
            now = time.monotonic()
            away = {name for name, work in self.models.items() if now < work.paused_until}
            if len(away) == len(self.models):
                break
            busy = {name for name in self.models if not self._has_room(name)}
            is_full = len(busy) == len(self.models)
            job = await self.leases.run(self.store.claim, self.name, self.lease_s, is_full, busy, away)
            if job is None:
                break
            if job.id in self.running:  # its lease had ended, but nobody else saw it
                continue
            self.meter.count("triptych_job_takeovers_total", float(job.taken_over))
            if not self._suspected.may_begin(job):  # here when the other one ends this process, it would be blamed
                await self.threads.run(self.store.postpone, self.name, job.id, POSTPONED_S)
                continue
            self.ledger.begun(job)
            task = asyncio.create_task(self._traced(job))
            self.running[job.id] = task
            self._model_of[job.id] = job.asked.model
            task.add_done_callback(partial(self._ended, job.id))
            self.watch.notify(job.id)
        await wait_for_change(change, POLL_S)

    def _ended(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self.running[job_id], self._model_of[job_id]
        self._suspected.passed(job_id)
        self.ledger.ended(job_id)
        self.changes.notify()
        self.watch.notify(job_id)

    def _has_room(self, model: str) -> bool:
        """For one more job of it that nobody waits for."""
        num_running = sum(each == model for each in self._model_of.values())
        if num_running < self.max_running:
            return True
        return num_running < self.max_running + MOST_BESIDE_CALLERS and self.ledger.are_behind(model)

    async def _keep_leases(self) -> None:
        running = list(self.running)
        kept = await self.leases.run(self.store.renew, self.name, running, self.lease_s) if running else set()
        for job_id in running:
            if job_id not in kept and job_id in self.running:
                self.running[job_id].cancel()
        await asyncio.sleep(self.lease_s / HEARTBEATS_PER_LEASE)

    def stop_job(self, job_id: str) -> None:
        """It was cancelled or deleted: do not wait until its lease is found gone."""
        if job_id in self.running:
            self.running[job_id].cancel()

    async def _remove_expired(self) -> None:
        for job_id in await self.threads.run(self.store.expired):
            try:
                await self.remove(job_id)
            except JobNotFoundError:
                continue  # another runner was faster
            except StorageError as error:
                logger.warning("the outputs of the expired job %s could not be removed yet: %s", job_id, error)
        await asyncio.sleep(CLEANING_S)

    async def remove(self, job_id: str, owner: str | None = None) -> Job:
        """Its outputs are removed, then its record; if it runs, it is stopped. Returns it as it was.

        Raises JobNotFoundError, StorageError.
        """
        job = await self.threads.run(self.store.get, job_id, owner)
        await self._delete_objects(output.key for output in job.outputs)
        job = await self.threads.run(self.store.delete, job_id, owner)
        self.stop_job(job_id)
        await self._delete_objects(output.key for output in job.outputs)  # made meanwhile
        return job

    async def _delete_objects(self, keys: Any) -> None:
        for key in keys:
            await self.storage.delete(key)

    # --- one job ---

    async def _traced(self, job: Job) -> None:
        """In the trace of the HTTP request that it came with, whichever runner took it before."""
        if not tracing.is_on():
            await self._run(job)
            return
        trace = trace_from_json(job.requests)
        claims = [each for each in await self._events(job) if each.kind == "in_progress"]
        if len(claims) <= 1:
            with tracing.begun("queue", trace, job.created_at, job_id=job.id):
                pass
        told = {"attempt": max(1, len(claims)), "taken_over": job.taken_over, "n": len(job.requests)}
        with tracing.begun("job", trace, job_id=job.id, kind=job.kind, **told):
            await self._run(job)

    async def _events(self, job: Job) -> list[Event]:
        """No events where the store is away: a trace is no reason to leave a job."""
        try:
            return (await self.threads.run(self.store.story, job.id, 0)).events
        except (JobNotFoundError, StageUnavailableError, *STORE_FAILED):
            return []

    async def _run(self, job: Job) -> None:
        try:
            if job.takeovers > MAX_TAKEOVERS:
                message = f"the processes that worked on it ended {job.takeovers} times in a row"
                await self._fail(job, ErrorReport(500, "server_error", message, "generation_failed"))
                return
            await self._make(job)
            await self.threads.run(self.store.complete, self.name, job.id)
            tell_end(self.meter, job, "completed")
        except LeaseLostError as error:
            logger.info("job %s is left: %s", job.id, error)
        except STORE_FAILED:
            logger.exception("job %s is left to whoever finds its lease ended: the job store failed", job.id)
        except Exception as error:  # noqa: BLE001  (whatever it is, the job's caller is told)
            await self._end_badly(job, error)

    async def _end_badly(self, job: Job, error: Exception) -> None:
        original = original_error(error)
        # A stage lacks what this job needs, or an update may bring it: others need not wait.
        if isinstance(original, OtherVersionError) or (
            isinstance(original, StageUnavailableError) and isinstance(error, RayTaskError)
        ):
            await self._postpone(job, POSTPONED_S, original)
            return
        if isinstance(original, TRANSIENT) and not isinstance(error, RayTaskError):
            work = self.models.get(job.asked.model)  # None: it is no longer served
            pause_s = work.pause() if work is not None and isinstance(original, AWAY) else POSTPONED_S
            logger.warning("job %s is tried again in %g s: %s", job.id, pause_s, type(original).__name__)
            try:
                if isinstance(original, AWAY):
                    await self.threads.run(self.store.postpone, self.name, job.id, pause_s)
                else:  # its lease will end as if this runner had died, so it is not tried for ever
                    await self.threads.run(self.store.renew, self.name, [job.id], pause_s)
            except STORE_FAILED:
                logger.exception("job %s is left to whoever finds its lease ended: the job store failed", job.id)
            return
        await self._fail(job, report_error(error, job.id))

    async def _postpone(self, job: Job, pause_s: float, error: Exception) -> None:
        logger.warning("job %s is tried again in %g s: %s", job.id, pause_s, error)
        try:
            await self.threads.run(self.store.postpone, self.name, job.id, pause_s)
        except STORE_FAILED:
            logger.exception("job %s is left to whoever finds its lease ended: the job store failed", job.id)

    async def _fail(self, job: Job, report: ErrorReport) -> None:
        tracing.current().fail(report.code or report.type)
        try:
            await self.threads.run(self.store.fail, self.name, job.id, error_to_json(report))
            tell_end(self.meter, job, "failed")
        except LeaseLostError as lost:
            logger.info("job %s failed, but %s", job.id, lost)
        except STORE_FAILED:
            logger.exception("job %s failed, but the job store too: it is tried again when its lease has ended", job.id)

    async def _make(self, job: Job) -> None:
        """What the job's requests still lack."""
        pictures = await self.threads.run(self.store.input_images, job.id)
        saved = await self.threads.run(self.store.checkpoints, job.id)
        requests = requests_from_json(job.requests, pictures)
        for each in requests:
            if each.model not in self.models:
                raise ModelNotFoundError(f"the model {each.model!r} is no longer served here")
        done = {output.request for output in job.outputs}
        running = RunningJob(job, [float(number in done) for number in range(len(requests))])
        writer = asyncio.create_task(self._write(running))
        tasks = []
        for number, previews in enumerate(previews_from_json(job.requests)):
            if number not in done:
                checkpoint = checkpoint_from_bytes(saved.pop(number)) if number in saved else None
                follower = JobFollower(running, number, previews, checkpoint)
                tasks.append(asyncio.create_task(self._make_one(requests[number], follower)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (writer, *tasks):
                task.cancel()
            await asyncio.gather(writer, *tasks, return_exceptions=True)

    async def _make_one(self, request: GenerationRequest, follower: JobFollower) -> None:
        running, number = follower.running, follower.request
        work = self.models[request.model]
        try:
            media = await work.make(request, follower)
        finally:
            follower.end()
        work.pause_s = 0.0
        self.ledger.made(running.job, number, media)
        await self._save_what_is_left(running)
        running.shares[number] = DENOISING_SHARE
        day = datetime.fromtimestamp(running.job.created_at, UTC)  # so that a takeover writes the same objects
        stored = await store_media_in_the_end(
            self.storage, request, media, day, partial(self._tell_of_trouble, running.job, number)
        )
        outputs = [Output(request=number, **vars(file)) for file in stored]
        try:
            if media.warnings:
                await self.threads.run(self.store.save_warnings, self.name, running.job.id, media.warnings)
            await self.threads.run(
                self.store.save_outputs, self.name, running.job.id, number, outputs, media.seconds, media.usage
            )
        except LeaseLostError:
            await self._remove_if_unwanted(running.job.id, outputs)
            raise
        running.shares[number] = 1.0
        self.watch.notify(running.job.id)

    async def _tell_of_trouble(self, job: Job, number: int, error: StorageError) -> None:
        """What was made waits here for the storage; its checkpoint stays in the job store until it is stored."""
        logger.error("job %s: what was made cannot be stored now, and is tried again until it is: %s", job.id, error)
        try:
            await self._save_wait(job.id, number, "storage")
        except STORE_FAILED:
            logger.exception("the events of job %s could not be saved", job.id)

    async def _save_wait(self, job_id: str, number: int, what_for: str, about_s: float | None = None) -> None:
        data: dict[str, Any] = {"request": number, "for": what_for}
        if what_for == "model":
            data["about_s"] = None if about_s is None else math.ceil(about_s)
        await self._save_event(job_id, "waiting", data)

    async def _save_event(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        await self.threads.run(self.store.save_event, self.name, job_id, kind, data)
        self.watch.notify(job_id)

    async def _remove_if_unwanted(self, job_id: str, outputs: list[Output]) -> None:
        """A cancelled or deleted job leaves nothing; a runner that took it over stores under the same keys."""
        try:
            job = await self.threads.run(self.store.get, job_id)
        except JobNotFoundError:
            job = None
        if job is None or job.status == "cancelled":
            await self._delete_objects(output.key for output in outputs)

    async def _write(self, running: RunningJob) -> None:
        """Save the latest step and checkpoints, as often as WRITE_SHARE allows."""
        while True:
            await running.changed.wait()
            running.changed.clear()
            began = time.perf_counter()
            await self._save_what_is_left(running)
            spent_s = time.perf_counter() - began
            await asyncio.sleep(max(WRITE_PAUSE_S, spent_s * (1 / WRITE_SHARE - 1)))

    async def _save_what_is_left(self, running: RunningJob) -> None:
        """A picture is stored after its previews, however quickly it was made."""
        try:
            async with running.saving:
                await self._save(running)
        except LeaseLostError as error:  # _keep_leases ends the job
            logger.info("the progress of job %s is not saved: %s", running.job.id, error)
        except Exception:  # what is left is saved again
            logger.exception("the progress of job %s could not be saved", running.job.id)
            asyncio.get_running_loop().call_later(POLL_S, running.changed.set)

    async def _save(self, running: RunningJob) -> None:
        """Nothing leaves `running` before it is written: the store may be away. One at a time (`running.saving`)."""
        job_id, step = running.job.id, running.step
        if running.has_begun:
            await self.threads.run(self.store.save_beginning, self.name, job_id)
            running.has_begun = False
        if warnings := list(running.warnings):
            await self.threads.run(self.store.save_warnings, self.name, job_id, warnings)
            del running.warnings[: len(warnings)]
        while running.waits:
            request, what_for, about_s = running.waits[0]
            if what_for is None:
                await self._save_event(job_id, "begun", {"request": request})
            else:
                await self._save_wait(job_id, request, what_for, about_s)
            del running.waits[0]
        if step is not None:
            await self.threads.run(self.store.save_progress, self.name, job_id, running.progress, step)
            if running.step is step:
                running.step = None
            self.watch.notify(job_id)
        while running.previews:
            await self._save_preview(running)
        for number in list(running.checkpoints):
            checkpoint = running.checkpoints.get(number)
            if checkpoint is None:  # its request is done
                continue
            await self.threads.run(self._save_checkpoint, job_id, number, checkpoint)
            if running.checkpoints.get(number) is checkpoint:
                del running.checkpoints[number]
            self._suspected.passed(job_id)

    async def _save_preview(self, running: RunningJob) -> None:
        """The first that waits; one that is no picture is left out, and stands in nobody's way."""
        preview = running.previews.pop(0)
        request, at_step, file = preview
        event = {"request": request, "step": at_step, **await asyncio.to_thread(small_picture, file.data)}
        try:
            await self.threads.run(self.store.save_event, self.name, running.job.id, "preview", event)
        except STORE_FAILED:
            running.previews.insert(0, preview)
            raise
        self.watch.notify(running.job.id)

    def _save_checkpoint(self, job_id: str, number: int, checkpoint: Checkpoint) -> None:
        data = checkpoint_to_bytes(checkpoint)
        self.store.save_checkpoint(self.name, job_id, number, checkpoint.step, data)


def tell_end(meter: Meter, job: Job, status: Status) -> None:
    """The end of a job and how long it took, to the meter."""
    meter.count("triptych_jobs_ended_total", model=job.asked.model, outcome=status)
    meter.observe("triptych_job_seconds", max(0.0, time.time() - job.created_at), outcome=status)
    if job.started_at is not None:
        meter.observe("triptych_job_wait_seconds", max(0.0, job.started_at - job.created_at))
