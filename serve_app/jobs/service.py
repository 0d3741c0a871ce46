"""Jobs as the routes use them: ask for one, look at it, wait for it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import threading
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from deployments import tracing
from deployments.errors import (
    InvalidRequestError,
    NotSupportedError,
    OtherVersionError,
    StageUnavailableError,
    StorageError,
)
from deployments.messages import GenerationRequest, Media, MediaKind, StageDescription
from deployments.metrics.meter import NO_METER, Meter
from env_config.secret import SecretReference
from serve_app.deadlines import NO_LIMITS, TimeLimits, not_begun, not_done
from serve_app.errors import (
    CancelAfterError,
    ConflictError,
    JobNotFoundError,
    JobStoreAwayError,
    StartTimeoutError,
    TimeLimitError,
    report_error,
)
from serve_app.jobs.codec import error_to_json, previews_from_json, requests_from_json, requests_to_json
from serve_app.jobs.database import StoreURL, open_database
from serve_app.jobs.events import JobEvent, JobWatch
from serve_app.jobs.ledger import JobLedger
from serve_app.jobs.records import ENDED, IdempotencyKey, Job, NewJob, OverdueJob, Status, Webhook
from serve_app.jobs.runner import JobRunner, tell_end
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import Changes, StoreThreads
from serve_app.jobs.webhooks.delivery import WebhookRules, check_webhook_url, read_secret
from serve_app.jobs.webhooks.sender import WebhookSender
from serve_app.making.admission import size_of
from serve_app.making.at_once import MakeAtOnce, note_admitted
from serve_app.making.follower import Follower, Make
from serve_app.making.served_model import ServedModel
from serve_app.requests.given.earlier_requests import check_taken
from serve_app.storage.base import StorageBackend
from serve_app.storage.outputs import OutputURLs

logger = logging.getLogger(__name__)

OVERDUE_PAUSE_S = 0.5  # between looks for jobs whose time is over
RELEASING_S = 5.0  # at most, at a stop


class JobArgs(BaseModel):
    """How jobs are kept and run."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    store_url: StoreURL | None = Field(
        None,
        description="postgresql://host/database for several machines, its password in PGPASSFILE, or where such a URL "
        "with a password stands: {file: PATH} or {env: NAME}; default: jobs.sqlite below the cache root",
    )
    max_running: int = Field(
        8,
        ge=1,
        description="jobs of each model that an ingress replica runs at a time; while callers wait, more, up to "
        "`admission.jobs_share`",
    )
    max_queued: int = Field(1000, ge=1, description="jobs of each model that may wait; beyond it new ones get 429")
    lease_s: float = Field(15, gt=0, description="seconds after the death of a replica until its jobs are taken over")
    webhook_secret: SecretReference | None = Field(
        None,
        description="{file: PATH} or {env: NAME}: where the secret stands that signs webhooks "
        "(https://www.standardwebhooks.com); without it webhook_url is refused",
    )
    lifetime_s: float = Field(86_400, gt=0, description="seconds after its end until a job and its outputs are removed")


class Jobs:
    """The jobs of an application, and the runner of this ingress replica."""

    def __init__(
        self,
        args: JobArgs,
        cache_root: Path,
        application: str,
        models: Mapping[str, MakeAtOnce],
        storage: StorageBackend,
        webhook_rules: WebhookRules | None = None,
        meter: Meter = NO_METER,
    ) -> None:
        """Opens the store. `models`: how each of those whose jobs can be made makes them, by its name.

        Raises JobStoreError, and SecretError for a secret that cannot be read.
        """
        self.args = args
        self.database = open_database(args.store_url, cache_root)
        self.store = JobStore(self.database, application, args.lifetime_s, models=models.keys())
        self.threads = StoreThreads("job-store")
        self.leases = StoreThreads("job-leases", max_threads=2)
        self.following = StoreThreads("job-followers", max_threads=2)
        self.changes = Changes()
        self.watch = JobWatch(self.store, self.following)
        self.storage = storage
        self.models = models
        self.meter = meter
        self._is_closed = False
        self.webhook_rules = webhook_rules or WebhookRules()
        name = uuid.uuid4().hex
        self.webhooks: WebhookSender | None = None
        secret = read_secret(args.webhook_secret)
        if secret is not None:
            self.webhooks = WebhookSender(self.store, self.threads, name, secret, self.webhook_rules, self._urls, meter)
        admissions = {model: making.admission for model, making in models.items()}
        self.ledger = JobLedger(admissions, self.store, self.threads, name)
        self.runner = JobRunner(
            self.store, self.threads, self.leases, self.changes, self.watch,
            {model: make_stored(making) for model, making in models.items()}, storage, name,
            self.ledger, args.max_running, args.lease_s, meter,
        )  # fmt: skip

    def start(self) -> None:
        """Begin to run jobs; from the event loop."""
        self.runner.start(self.ledger.keep, self._cancel_overdue, *([self.webhooks.keep] if self.webhooks else []))

    def close(self) -> None:
        """Stop to run jobs, give them back and close the store; a second time is of no effect."""
        if not self._is_closed:
            self._is_closed = True
            self.runner.stop()
            if self.webhooks is not None:
                self.webhooks.stop()
            for threads in (self.threads, self.leases, self.following):
                threads.close()  # before the release: a job that is being claimed now is given back too
            releasing = threading.Thread(target=self._release, daemon=True)  # a store that hangs holds up no stop
            releasing.start()
            releasing.join(RELEASING_S)

    def _release(self) -> None:
        try:
            self.store.release(self.runner.name)
        except SQLAlchemyError as error:
            logger.warning(
                "the jobs of this replica could not be given back, others find their leases ended: %s", error
            )
        finally:
            self.store.close()

    async def submit(
        self,
        kind: MediaKind,
        job_id: str,
        requests: Sequence[GenerationRequest],
        shown: dict[str, Any],
        owner: str,
        key: IdempotencyKey | None = None,
        webhook_url: str | None = None,
        is_awaited: bool = False,
        previews: int = 0,
        limits: TimeLimits = NO_LIMITS,
    ) -> Job:
        """The job of the requests, all of one model, or the one that was asked for with the same key before.

        `previews`: pictures that each request is to show on its way, as events of the job.
        `limits`: after which it is cancelled, whichever replica took it or runs it.
        `is_awaited`: the caller waits for its end, so it goes before those that nobody waits for, and the queue before
        it may be no longer than that of other requests.
        Raises ConflictError for a key that stood for something else, OverloadedError for a full queue, and
        InvalidRequestError for a `webhook_url` that must not be called.
        """
        if webhook_url is not None:
            if self.webhooks is None:
                raise NotSupportedError("webhook_url is not supported: jobs.webhook_secret is not set", "webhook_url")
            check_webhook_url(webhook_url, self.webhook_rules)
        known = await self.job_of_key(owner, key)
        if known is not None:  # a repeated request takes no queue space
            return known
        making = self.models[requests[0].model]
        # One that is awaited goes before those that wait, and has a bound of its own (`max_pending`).
        if not is_awaited and await self._num_queued(requests[0].model) >= self.args.max_queued:
            raise making.admission.refused_for("jobs", "too many jobs are waiting")
        description = await making.model.describe()
        sizes = [size_of(request, description) for request in requests]
        rows, pictures = requests_to_json(requests, previews, tracing.carried())
        warnings = requests[0].warnings
        new = NewJob(job_id, kind, rows, pictures, shown, owner, webhook_url, sizes, limits, is_awaited, warnings)
        with self.ledger.entering(job_id, requests[0].model, sizes, owner, is_awaited):
            note_admitted(making.admission)
            job, is_new = await self.threads.run(self.store.add, new, key)
        tracing.current().set(job_id=job.id)
        if is_new:
            self.meter.count("triptych_jobs_taken_total", model=requests[0].model, kind=kind)
            self.changes.notify()
        else:
            self.ledger.close(job_id)
        return job

    async def _num_queued(self, model: str) -> int:
        return await self.threads.run(self.store.count, "queued", model)

    async def job_of_key(self, owner: str, key: IdempotencyKey | None) -> Job | None:
        """The job that the key stands for, if it was used before. Raises ConflictError for a key of another request."""
        known = None if key is None else await self.threads.run(self.store.job_of_key, owner, key)
        tracing.current().set(job_id=known.id if known else None)
        return known

    async def counts(self) -> dict[str, int]:
        """How many of the application's jobs wait and run, whichever replica took them. Raises JobStoreAwayError."""
        return {status: await self.following.run(self.store.count, status) for status in ("queued", "in_progress")}

    async def tell(self) -> None:
        """How many jobs there are, to the meter, and whether the store answers. Raises nothing of the store's."""
        try:
            counts = await self.following.run(self.store.counts)
        except (JobStoreAwayError, SQLAlchemyError, StageUnavailableError):
            self.meter.set("triptych_job_store_up", 0)
            return
        self.meter.set("triptych_job_store_up", 1)
        for status, count in counts.items():
            self.meter.set("triptych_jobs", count, status=status)

    async def get(self, job_id: str, owner: str | None) -> Job:
        """The job, whoever's it is where `owner` is None. Raises JobNotFoundError."""
        return await self.threads.run(self.store.get, job_id, owner)

    async def page(
        self,
        owner: str,
        kind: str | None,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        statuses: Collection[Status] = (),
        model: str | None = None,
    ) -> tuple[list[Job], bool]:
        """See JobStore.page."""
        return await self.threads.run(self.store.page, owner, kind, after, limit, order, statuses, model)

    async def requests_of(self, job: Job) -> list[GenerationRequest]:
        """What the job was asked for."""
        return requests_from_json(job.requests, await self.threads.run(self.store.input_images, job.id))

    def previews_of(self, job: Job) -> int:
        """How many pictures each of the job's requests was to show on its way."""
        return max(previews_from_json(job.requests), default=0)

    async def end_of(self, job_id: str, owner: str, at_most_s: float = math.inf) -> Job:
        """The job when it has ended, or as it stands after `at_most_s`.

        Raises JobNotFoundError if it is deleted meanwhile.
        """
        job = await self.get(job_id, owner)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(at_most_s) else at_most_s):
                while not job.has_ended:
                    async for event in self.watch.events(job_id, after=None):
                        if event.kind in (*ENDED, "deleted"):
                            break
                    job = await self.get(job_id, owner)
        return job if job.has_ended else await self.get(job_id, owner)

    async def queue_position(self, job: Job) -> int | None:
        """How many wait before it; None if it does not wait."""
        return await self.threads.run(self.store.queue_position, job.id)

    def events(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """What happens to the job after its event number `after`, to its end."""
        return self.watch.events(job_id, after)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """The cancelled job. Raises JobNotFoundError, and ConflictError if it has ended otherwise."""
        await self._cancel(await self.threads.run(self.store.cancel, job_id, owner))
        return await self.get(job_id, owner)

    async def _cancel(self, job: Job) -> None:
        """`job` as it was before it was cancelled."""
        if not job.has_ended:
            tell_end(self.meter, job, "cancelled")
        self.runner.stop_job(job.id)
        self.ledger.close(job.id)
        self.watch.notify(job.id)
        for output in job.outputs:
            try:
                await self.storage.delete(output.key)
            except StorageError as error:  # the job is cancelled all the same
                logger.warning("%s of the cancelled job %s is left in the storage: %s", output.key, job.id, error)

    async def _cancel_overdue(self) -> None:
        """Whichever replica looks first; the one that runs the job finds its lease gone."""
        for overdue in await self.threads.run(self.store.overdue):
            with contextlib.suppress(JobNotFoundError, ConflictError):  # it has ended in between
                error = error_to_json(report_error(_too_late(overdue), overdue.id))
                await self._cancel(await self.threads.run(self.store.cancel, overdue.id, None, error))
        await asyncio.sleep(OVERDUE_PAUSE_S)

    async def delete(self, job_id: str, owner: str) -> Job:
        """The job as it was: stopped, its outputs removed, its record gone. Raises JobNotFoundError."""
        job = await self.runner.remove(job_id, owner)
        self.ledger.close(job_id)
        self.watch.notify(job_id)
        return job

    async def _urls(self, webhook: Webhook) -> list[str]:
        """Of the outputs of a job that completed."""
        if webhook.status != "completed":
            return []
        try:
            job = await self.get(webhook.job_id, None)
        except JobNotFoundError:  # deleted since
            return []
        urls = OutputURLs(self.storage, job.base_url or "")
        return [urls.of(output.key) for output in job.outputs]

    async def mark_uploaded(self, key: str) -> None:
        """An output is in the storage now. Raises StorageError when that cannot be written down yet."""
        try:
            await self.threads.run(self.store.mark_uploaded, key)
        except (JobStoreAwayError, SQLAlchemyError, StageUnavailableError) as error:
            raise StorageError("the job store cannot be written to") from error


def make_stored(making: MakeAtOnce) -> Make:
    """Makes the requests of jobs: a job may have been stored before the model of its name became another one.

    Limits are not asked again: what was accepted is made.
    """

    async def make(request: GenerationRequest, follower: Follower) -> Media:
        """Raises NotSupportedError or InvalidRequestError for what the model does not take, OtherVersionError where
        another version of it may."""
        model = making.model
        with contextlib.suppress(StageUnavailableError):  # then the stages themselves say it, once they are there
            description = await model.describe()
            try:
                check_taken(request, description, model.configured_arguments)
            except InvalidRequestError:  # what was kept may be of before an update: nothing fails for good by that
                check_taken(request, await _described_now(model), model.configured_arguments)
        return await making.make(request, follower)

    return make


async def _described_now(model: ServedModel) -> StageDescription:
    """Raises OtherVersionError where it is not known what the model takes now."""
    try:
        return await model.describe_again()
    except StageUnavailableError as error:
        raise OtherVersionError(f"an earlier version would refuse this, and no other answers: {error}") from error


def _too_late(job: OverdueJob) -> TimeLimitError:
    if job.limit == "start_by":
        return StartTimeoutError(not_begun(job.seconds))
    return CancelAfterError(not_done(job.seconds))


def new_job_id(kind: MediaKind) -> str:
    """It begins with the kind, as OpenAI's ids of videos do."""
    return f"{kind}_{uuid.uuid4().hex}"


def body_digest(route: str, body: BaseModel) -> str:
    """The same for bodies that ask the same of a route, in whatever form they were sent."""
    values = body.model_dump(exclude_unset=True, warnings=False)  # pictures are no models of pydantic's

    def plain(value: Any) -> Any:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else vars(value)

    return hashlib.sha256(f"{route} {json.dumps(values, sort_keys=True, default=plain)}".encode()).hexdigest()
