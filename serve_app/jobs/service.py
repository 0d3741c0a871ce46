"""Jobs as the routes use them: ask for one, look at it, wait for it, end it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from sqlalchemy.exc import SQLAlchemyError

from deployments.errors import NotSupportedError, StageUnavailableError, StorageError
from deployments.messages import GenerationRequest, MediaKind, StageDescription
from serve_app.jobs.codec import previews_from_json, requests_from_json, requests_to_json
from serve_app.jobs.database import open_database
from serve_app.jobs.events import JobEvent, job_events
from serve_app.jobs.ledger import JobLedger
from serve_app.jobs.records import IdempotencyKey, Job, NewJob, Webhook
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import Changes, StoreThreads, wait_for_change
from serve_app.jobs.webhooks import WebhookRules, check_webhook_url, deliver, signed_headers
from serve_app.making.admission import Admission, size_of
from serve_app.making.follower import Make
from serve_app.storage.base import StorageBackend

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between looks at a job that another process runs
MAX_WEBHOOKS = 16  # sent at a time
WEBHOOK_PAUSE_S = 1.0  # between looks for jobs whose end is to be told
WEBHOOK_AGAIN_S = 900.0  # longer than all attempts at one take


class JobArgs(BaseModel):
    """How jobs are kept and run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store_url: str | None = Field(
        None,
        description="postgresql://host/database for several machines (a password is better in PGPASSFILE); "
        "default: jobs.sqlite below the cache root",
    )
    max_running: int = Field(8, ge=1, description="jobs that an ingress replica runs at a time")
    max_queued: int = Field(1000, ge=1, description="jobs that may wait; beyond it new ones get 429")
    lease_s: float = Field(15, gt=0, description="seconds after the death of a replica until its jobs are taken over")
    webhook_secret: SecretStr | None = Field(
        None, description="signs webhooks (https://www.standardwebhooks.com); without it webhook_url is refused"
    )
    lifetime_s: float = Field(86_400, gt=0, description="seconds after its end until a job and its outputs are removed")

    @field_validator("webhook_secret")
    @classmethod
    def check_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        """Raises ValueError for a secret that cannot sign."""
        if secret is not None:
            signed_headers(secret.get_secret_value(), "", 0, b"")
        return secret


class Jobs:
    """The jobs of an application, and the runner of this ingress replica."""

    def __init__(
        self,
        args: JobArgs,
        cache_root: Path,
        application: str,
        make: Make,
        storage: StorageBackend,
        admission: Admission,
        describe: Callable[[], Awaitable[StageDescription]],
        webhook_rules: WebhookRules | None = None,
    ) -> None:
        """Opens the store; raises JobStoreError."""
        self.args = args
        self.store = JobStore(open_database(args.store_url, cache_root), application, args.lifetime_s)
        self.threads = StoreThreads()
        self.changes = Changes()
        self.storage = storage
        self.describe = describe
        self._is_closed = False
        self.webhook_rules = webhook_rules or WebhookRules()
        self._webhooks: set[asyncio.Task[None]] = set()
        name = uuid.uuid4().hex
        self.ledger = JobLedger(admission, self.store, self.threads, name)
        self.runner = JobRunner(
            self.store, self.threads, self.changes, make, storage, name, args.max_running, args.lease_s,
            on_made=self.ledger.made,
        )  # fmt: skip

    def start(self) -> None:
        """Begin to run jobs; from the event loop."""
        self.runner.start(self.ledger.keep, *([self._send_webhooks] if self.args.webhook_secret else []))

    def close(self) -> None:
        """Stop to run jobs, give them back and close the store; a second time is of no effect."""
        if not self._is_closed:
            self._is_closed = True
            self.runner.stop()
            for task in self._webhooks:
                task.cancel()
            self.threads.close()  # before the release: a job that is being claimed now is given back too
            self.store.release(self.runner.name)
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
    ) -> Job:
        """The job of the requests, or the one that was asked for with the same key before.

        `previews`: pictures that each request is to show on its way, as events of the job.
        `is_awaited`: the caller waits for its end, so the queue before it may be no longer than that of other requests.
        Raises ConflictError for a key that stood for something else, OverloadedError for a full queue, and
        InvalidRequestError for a `webhook_url` that must not be called.
        """
        if webhook_url is not None:
            if self.args.webhook_secret is None:
                raise NotSupportedError("webhook_url is not supported: jobs.webhook_secret is not set", "webhook_url")
            check_webhook_url(webhook_url, self.webhook_rules)
        if key is not None:  # a repeated request takes no queue space
            known = await self.threads.run(self.store.job_of_key, owner, key)
            if known is not None:
                return known
        if await self.threads.run(self.store.count, "queued") >= self.args.max_queued:
            raise self.ledger.admission.overloaded("too many jobs are waiting")
        description = await self.describe()
        sizes = [size_of(request, description) for request in requests]
        rows, pictures = requests_to_json(requests, previews)
        new = NewJob(job_id, kind, rows, pictures, shown, owner, webhook_url, sizes, requests[0].warnings)
        with self.ledger.entering(job_id, sizes, owner, is_awaited):
            job, is_new = await self.threads.run(self.store.add, new, key)
        if is_new:
            self.changes.notify()
        else:
            self.ledger.close(job_id)
        return job

    async def get(self, job_id: str, owner: str) -> Job:
        """Raises JobNotFoundError."""
        return await self.threads.run(self.store.get, job_id, owner)

    async def page(
        self, owner: str, kind: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """See JobStore.page."""
        return await self.threads.run(self.store.page, owner, kind, after, limit, order)

    async def requests_of(self, job: Job) -> list[GenerationRequest]:
        """What the job was asked for."""
        return requests_from_json(job.requests, await self.threads.run(self.store.input_images, job.id))

    def previews_of(self, job: Job) -> int:
        """How many pictures each of the job's requests was to show on its way."""
        return max(previews_from_json(job.requests), default=0)

    async def end_of(self, job_id: str, owner: str) -> Job:
        """The job when it has ended. Raises JobNotFoundError if it is deleted meanwhile."""
        while True:
            change = self.changes.next()
            job = await self.get(job_id, owner)
            if job.has_ended:
                return job
            await wait_for_change(change, POLL_S)

    async def queue_position(self, job: Job) -> int | None:
        """How many wait before it; None if it does not wait."""
        return await self.threads.run(self.store.queue_position, job.id)

    def events(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """What happens to the job after its event number `after`, to its end."""
        return job_events(self.store, self.threads, self.changes, job_id, after)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """The cancelled job. Raises JobNotFoundError, and ConflictError if it has ended otherwise."""
        job = await self.threads.run(self.store.cancel, job_id, owner)
        self.runner.stop_job(job_id)
        self.ledger.close(job_id)
        self.changes.notify()
        for output in job.outputs:
            await self.storage.delete(output.key)
        return await self.get(job_id, owner)

    async def delete(self, job_id: str, owner: str) -> Job:
        """The job as it was: stopped, its outputs removed, its record gone. Raises JobNotFoundError."""
        job = await self.runner.remove(job_id, owner)
        self.ledger.close(job_id)
        self.changes.notify()
        return job

    async def _send_webhooks(self) -> None:
        """At least once each: one whose sender died is sent again, with the same id."""
        room = MAX_WEBHOOKS - len(self._webhooks)
        for webhook in await self.threads.run(self.store.take_webhooks, room, WEBHOOK_AGAIN_S) if room else ():
            task = asyncio.create_task(self._send(webhook))
            self._webhooks.add(task)
            task.add_done_callback(self._webhooks.discard)
        await asyncio.sleep(WEBHOOK_PAUSE_S)

    async def _send(self, webhook: Webhook) -> None:
        assert self.args.webhook_secret is not None
        webhook_id = f"wh_{webhook.job_id}"
        payload = {
            "id": webhook_id,
            "object": "event",
            "type": f"{webhook.kind}.{webhook.status}",  # as OpenAI's: video.completed, video.failed
            "created_at": int(webhook.completed_at),
            "data": {"id": webhook.job_id},
        }
        secret = self.args.webhook_secret.get_secret_value()
        await deliver(webhook.url, secret, payload, self.webhook_rules, webhook_id)
        await self.threads.run(self.store.webhook_done, webhook.job_id)

    async def mark_uploaded(self, key: str) -> None:
        """An output is in the storage now. Raises StorageError when that cannot be written down yet."""
        try:
            await self.threads.run(self.store.mark_uploaded, key)
        except (SQLAlchemyError, StageUnavailableError) as error:
            raise StorageError("the job store cannot be written to") from error


def new_job_id(kind: MediaKind) -> str:
    """It begins with the kind, as OpenAI's ids of videos do."""
    return f"{kind}_{uuid.uuid4().hex}"


def body_digest(route: str, body: BaseModel) -> str:
    """The same for bodies that ask the same of a route, in whatever form they were sent."""
    values = body.model_dump(exclude_unset=True)

    def plain(value: Any) -> Any:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else vars(value)

    return hashlib.sha256(f"{route} {json.dumps(values, sort_keys=True, default=plain)}".encode()).hexdigest()
