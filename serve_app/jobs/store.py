"""The durable store of jobs: every method is one transaction, and may be called from any thread.

A runner that works on a job holds a lease on it and renews it. What it writes counts only while the lease
is its own, so a runner that was thought dead can spoil nothing. Leases need no clock that is right (`leases`).
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from deployments.messages import RequestWarning, Usage
from serve_app.errors import ConflictError, JobNotFoundError, LeaseLostError
from serve_app.jobs import tables
from serve_app.jobs.codec import asked_from_json, trace_from_json, warnings_from_json
from serve_app.jobs.database import writing
from serve_app.jobs.leases import Lease, SeenLeases
from serve_app.jobs.records import (
    ENDED,
    STATUSES,
    Event,
    IdempotencyKey,
    Job,
    NewJob,
    News,
    Output,
    OverdueJob,
    Status,
    Story,
    UnfinishedJob,
    Webhook,
)
from serve_app.making.admission import Size

jobs = tables.jobs
BY_ITS_OWNER = {"code": "cancelled", "message": "the job was cancelled"}

EARLIER_LEASE_S = 15.0  # of rows that an earlier version wrote
UNSERVED_S = 30.0
FAILING_LEASE_S = 0.0  # of a job that is claimed to be failed: it is no sign that its model is served
SECOND_LOOK_S = 600.0  # a job that seems to have expired is looked at again after so long
LONGEST_WEBHOOK_PAUSE_S = 3600.0  # a delivery that is due later was dated by a clock that was wrong
_ID = re.compile(r"[A-Za-z0-9_-]{1,96}", re.ASCII)


class JobStore:
    """The jobs of one application in a database that others may share; `lifetime_s` counts from a job's end."""

    def __init__(
        self,
        engine: sa.Engine,
        application: str = "",
        lifetime_s: float = 86_400,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        models: Collection[str] | None = None,
    ) -> None:
        """`clock`: Unix time, `monotonic`: seconds that no one sets. `models`: whose jobs are claimed; None: any."""
        self.application = application
        self.lifetime_s = lifetime_s
        self._engine = engine
        self._writing = writing(engine)
        self._clock = clock
        self._monotonic = monotonic
        self._began = clock() - monotonic()
        self._models = models
        self._leases = SeenLeases(monotonic)
        self._unserved_since: dict[str, float] = {}  # monotonic
        self._expired_since: dict[str, float] = {}  # monotonic
        self._adopt()

    def close(self) -> None:
        self._engine.dispose()

    # --- what callers ask for ---

    def add(self, new: NewJob, idempotency_key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """The job and whether it is new: with a key that was used before it is the job of then.

        Raises ConflictError for a key that was used with another body.
        """
        try:
            with self._writing.begin() as connection:
                known = self._job_of_key(connection, new.owner, idempotency_key)
                if known is None:
                    self._insert(connection, new, idempotency_key)
                return self._read(connection, known or new.id), known is None
        except IntegrityError:  # PostgreSQL: the same key came in at the same time
            with self._engine.begin() as connection:
                known = self._job_of_key(connection, new.owner, idempotency_key)
                if known is None:
                    raise
                return self._read(connection, known), False

    def job_of_key(self, owner: str, idempotency_key: IdempotencyKey) -> Job | None:
        """The job that the key stands for, if it was used before. Raises ConflictError as `add` does."""
        with self._engine.begin() as connection:
            known = self._job_of_key(connection, owner, idempotency_key)
            return None if known is None else self._read(connection, known)

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Raises JobNotFoundError, also where `owner` is given and another's job is meant."""
        with self._engine.begin() as connection:
            return self._read(connection, job_id, owner)

    def page(
        self,
        owner: str,
        kind: str | None,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        statuses: Collection[Status] = (),
        model: str | None = None,
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs by the time they were asked for, from the one after `after`; and if there are more.

        Those whose status is one of `statuses`; empty: of any. None: of any kind, of any model.

        Raises JobNotFoundError for an unknown `after`.
        """
        with self._engine.begin() as connection:
            select = sa.select(jobs).where(jobs.c.application == self.application, jobs.c.owner == owner)
            if kind is not None:
                select = select.where(jobs.c.kind == kind)
            if model is not None:
                select = select.where(jobs.c.model == model)
            if statuses:
                select = select.where(jobs.c.status.in_(statuses))
            place = sa.tuple_(jobs.c.created_at, jobs.c.id)
            if after is not None:
                last = self._read(connection, after, owner, "after")
                mark = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                select = select.where(place > mark if order == "asc" else place < mark)
            direction = sa.asc if order == "asc" else sa.desc
            select = select.order_by(direction(jobs.c.created_at), direction(jobs.c.id)).limit(limit + 1)
            rows = connection.execute(select).all()
            return self._with_outputs(connection, rows[:limit]), len(rows) > limit

    def story(self, job_id: str, after: int | None) -> Story:
        """What happened to the job after its event number `after` (None: nothing of it), and where it stands.

        Raises JobNotFoundError.
        """
        with self._engine.begin() as connection:
            row = self._row(connection, job_id)
            last = int(connection.execute(_last_number(job_id)).scalar_one())
            events = _events(connection, {job_id: last if after is None else after})
            position = self._position(connection, row) if row.status == "queued" else None
        return Story(events.get(job_id, []), last, row.status in ENDED, position)

    def news(self, seen: Mapping[str, int]) -> News:
        """What happened to these jobs after the event number that stands with each."""
        events = tables.events
        select = sa.select(events.c.job_id, sa.func.max(events.c.number)).where(events.c.job_id.in_(seen))
        waiting = sa.select(jobs.c.id, jobs.c.is_awaited, jobs.c.created_at).where(
            jobs.c.application == self.application, jobs.c.status == "queued"
        )
        with self._engine.begin() as connection:
            last = {row[0]: row[1] for row in connection.execute(select.group_by(events.c.job_id))}
            changed = {job_id: seen[job_id] for job_id, number in last.items() if number > seen[job_id]}
            happened = _events(connection, changed) if changed else {}
            queue = {row.id: (not row.is_awaited, row.created_at) for row in connection.execute(waiting)}
        places = sorted(queue.values())
        positions = {job_id: bisect_left(places, queue[job_id]) for job_id in seen if job_id in queue}
        return News(happened, set(seen) - last.keys(), positions)

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs are started before it; None when it does not wait."""
        with self._engine.begin() as connection:
            row = self._row(connection, job_id)
            return self._position(connection, row) if row.status == "queued" else None

    def count(self, status: Status, model: str | None = None) -> int:
        """How many jobs have this status, of one model or of all."""
        select = sa.select(sa.func.count()).where(jobs.c.application == self.application, jobs.c.status == status)
        if model is not None:
            select = select.where(jobs.c.model == model)
        with self._engine.begin() as connection:
            return int(connection.execute(select).scalar_one())

    def counts(self) -> dict[Status, int]:
        """How many jobs have each status."""
        select = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.application == self.application)
        with self._engine.begin() as connection:
            found = {status: int(count) for status, count in connection.execute(select.group_by(jobs.c.status))}
        return {status: found.get(status, 0) for status in STATUSES}

    def unfinished(self) -> list[UnfinishedJob]:
        """All that wait or run."""
        select = sa.select(jobs.c.id, jobs.c.owner, jobs.c.lease_owner, jobs.c.sizes, jobs.c.is_awaited, jobs.c.model)
        select = select.where(jobs.c.application == self.application, _unfinished())
        with self._engine.begin() as connection:
            rows = connection.execute(select).all()
        return [UnfinishedJob(*row[:3], _sizes(row.sizes), row.is_awaited, row.model) for row in rows]

    def cancel(self, job_id: str, owner: str | None = None, error: dict[str, Any] | None = None) -> Job:
        """The job as it was, with outputs that are now nobody's; its runner finds its lease gone and stops.

        Raises JobNotFoundError, and ConflictError for a job that is completed or failed.
        """
        with self._writing.begin() as connection:
            row = self._row(connection, job_id, owner, lock=True)
            if row.status in ("completed", "failed"):
                raise ConflictError(f"the job {job_id!r} cannot be cancelled: it is {row.status}", "id", "job_ended")
            job = self._read(connection, job_id)
            if row.status != "cancelled":
                connection.execute(sa.delete(tables.outputs).where(tables.outputs.c.job_id == job_id))
                self._end(connection, job_id, "cancelled", error or BY_ITS_OWNER)
            return job

    def overdue(self) -> list[OverdueJob]:
        """Those that have not begun, or not ended, by the time that their callers gave them."""
        now = self._clock()
        too_late = sa.or_(jobs.c.start_by < now, jobs.c.cancel_at < now)
        select = sa.select(jobs.c.id, jobs.c.created_at, jobs.c.start_by, jobs.c.cancel_at)
        select = select.where(jobs.c.application == self.application, _unfinished(), too_late)
        with self._engine.begin() as connection:
            rows = connection.execute(select).all()
        overdue = []
        for row in rows:
            limit: Literal["start_by", "cancel_at"] = "cancel_at"
            if row.start_by is not None and row.start_by < now:
                limit = "start_by"
            overdue.append(OverdueJob(row.id, limit, round(getattr(row, limit) - row.created_at, 3)))
        return overdue

    def delete(self, job_id: str, owner: str | None = None) -> Job:
        """The job as it was; its record is gone and its runner stops. Raises JobNotFoundError."""
        with self._writing.begin() as connection:
            self._row(connection, job_id, owner, lock=True)
            job = self._read(connection, job_id)
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
            return job

    def expired(self, limit: int = 100) -> list[str]:
        """Jobs whose time is over, found so twice: a clock that jumps ahead must not remove what was just made."""
        now = min(self._clock(), self._began + self._monotonic())
        select = sa.select(jobs.c.id).where(jobs.c.application == self.application, jobs.c.expires_at < now)
        with self._engine.begin() as connection:
            found = list(connection.execute(select.order_by(jobs.c.expires_at).limit(100 * limit)).scalars())
        looked_at = self._monotonic()
        self._expired_since = {job_id: self._expired_since.get(job_id, looked_at) for job_id in found}
        second_look_s = min(SECOND_LOOK_S, self.lifetime_s)
        return [job_id for job_id, since in self._expired_since.items() if looked_at - since >= second_look_s][:limit]

    def mark_uploaded(self, key: str) -> None:
        """The output of this key is in the storage now."""
        change = sa.update(tables.outputs).where(tables.outputs.c.key == key).values(upload_pending=False)
        with self._writing.begin() as connection:
            connection.execute(change)

    def take_webhook(
        self, taker: str, again_after_s: float, busy: Collection[str] = (), repeated: bool = True
    ) -> Webhook | None:
        """One that is due, those that were never tried first; none of the targets in `busy`.

        The taker has `again_after_s` to deliver it; then it is due again. Without `repeated` only one that was
        never tried.
        """
        now = self._clock()
        is_due = sa.or_(jobs.c.webhook_due <= now, jobs.c.webhook_due > now + LONGEST_WEBHOOK_PAUSE_S)
        due = (
            sa.select(jobs.c.id)
            .where(jobs.c.application == self.application, is_due)
            .where(sa.func.coalesce(jobs.c.webhook_target, "").not_in(list(busy)))
            .order_by(jobs.c.webhook_attempts, jobs.c.webhook_due)
            .limit(1)
        )
        if not repeated:
            due = due.where(jobs.c.webhook_attempts == 0)
        with self._engine.begin() as connection:
            if connection.execute(due).scalar_one_or_none() is None:  # so that nothing is locked where nothing is due
                return None
        with self._writing.begin() as connection:
            job_id = connection.execute(due.with_for_update(skip_locked=True)).scalar_one_or_none()
            if job_id is None:
                return None
            change = sa.update(jobs).where(jobs.c.id == job_id)
            change = change.values(
                webhook_due=now + again_after_s, webhook_taker=taker, webhook_attempts=jobs.c.webhook_attempts + 1
            )
            columns = (jobs.c.id, jobs.c.kind, jobs.c.status, jobs.c.completed_at, jobs.c.webhook_url)
            more = (sa.func.coalesce(jobs.c.webhook_target, ""), jobs.c.webhook_attempts)
            *values, rows = connection.execute(change.returning(*columns, *more, jobs.c.requests)).one()
            return replace(Webhook(*values), trace=trace_from_json(rows))

    def webhook_failed(self, taker: str, job_id: str, again_after_s: float) -> None:
        """Its delivery failed; the next one is due so many seconds from now."""
        change = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.webhook_taker == taker)
        with self._writing.begin() as connection:
            connection.execute(change.values(webhook_due=self._clock() + again_after_s, webhook_taker=None))

    def webhook_done(self, job_id: str) -> None:
        """It was delivered, or given up."""
        with self._writing.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(webhook_due=None, webhook_taker=None))

    # --- what runners do ---

    def look_at_leases(self) -> list[Lease]:
        """Those that have ended. To be called all the time: only time in which it was called counts."""
        select = sa.select(jobs.c.id, jobs.c.lease_owner, jobs.c.heartbeat, jobs.c.lease_s)
        select = select.where(jobs.c.application == self.application, jobs.c.status == "in_progress")
        with self._engine.begin() as connection:
            rows = connection.execute(select).all()
        return self._leases.look(_lease(row) for row in rows)

    def claim(
        self,
        runner: str,
        lease_s: float,
        awaited_only: bool = False,
        busy: Collection[str] = (),
        away: Collection[str] = (),
    ) -> Job | None:
        """The job that waits longest, or whose lease or pause has ended; it is now leased to `runner`.

        Of models that are `busy` only one whose caller waits, of those that are `away` none.
        Those whose callers wait come before the others; one of another model only if it was free, and none of that
        model was worked on, for UNSERVED_S: it is not served any more.
        """
        now = self._clock()
        ended_leases = self.look_at_leases()
        ended = [
            sa.and_(
                jobs.c.id == lease.job_id,
                jobs.c.status == "in_progress",
                jobs.c.heartbeat == lease.heartbeat,
                jobs.c.lease_owner.is_not_distinct_from(lease.owner),
            )
            for lease in ended_leases[:100]
        ]
        is_free = sa.or_(jobs.c.status == "queued", *ended)
        first = (
            sa.select(jobs.c.id)
            .where(jobs.c.application == self.application, is_free)
            .where(self._is_for_this_replica(is_free, {lease.job_id for lease in ended_leases}))
            .where(sa.func.coalesce(jobs.c.start_by, now) >= now, sa.func.coalesce(jobs.c.cancel_at, now) >= now)
            .order_by(jobs.c.is_awaited.desc(), jobs.c.created_at, jobs.c.id)
            .limit(1)
        )
        if awaited_only:
            first = first.where(jobs.c.is_awaited)
        if busy:
            first = first.where(sa.or_(jobs.c.is_awaited, jobs.c.model.is_(None), jobs.c.model.not_in(busy)))
        if away:
            first = first.where(sa.or_(jobs.c.model.is_(None), jobs.c.model.not_in(away)))
        with self._engine.begin() as connection:
            if connection.execute(first).scalar_one_or_none() is None:  # so that nothing is locked where nothing waits
                return None
        with self._writing.begin() as connection:
            job_id = connection.execute(first.with_for_update(skip_locked=True)).scalar_one_or_none()
            if job_id is None:
                return None
            row = self._row(connection, job_id)
            taken_over = row.lease_owner is not None
            if self._models is not None and row.model is not None and row.model not in self._models:
                lease_s = FAILING_LEASE_S
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    status="in_progress",
                    started_at=row.started_at or self._clock(),
                    lease_owner=runner,
                    lease_s=lease_s,
                    heartbeat=row.heartbeat + 1,
                    takeovers=row.takeovers + taken_over,
                )
            )
            self._append(connection, job_id, "in_progress", {"taken_over": taken_over})
            job = replace(self._read(connection, job_id), taken_over=taken_over)
        self._leases.written(Lease(job_id, runner, row.heartbeat + 1, lease_s))
        return job

    def renew(self, runner: str, job_ids: Iterable[str], lease_s: float) -> set[str]:
        """Those of the jobs that are still the runner's, for `lease_s` more seconds."""
        return self._beat(runner, job_ids, lease_owner=runner, lease_s=lease_s)

    def postpone(self, runner: str, job_id: str, seconds: float) -> None:
        """Nobody works on the runner's job for so long; its next runner does not take it over from one that died."""
        self._beat(runner, [job_id], lease_owner=None, lease_s=seconds)

    def _beat(self, runner: str, job_ids: Iterable[str], **values: Any) -> set[str]:
        change = (
            sa.update(jobs)
            .where(jobs.c.id.in_(list(job_ids)), jobs.c.lease_owner == runner, jobs.c.status == "in_progress")
            .values(heartbeat=jobs.c.heartbeat + 1, **values)
            .returning(jobs.c.id, jobs.c.lease_owner, jobs.c.heartbeat, jobs.c.lease_s)
        )
        with self._writing.begin() as connection:
            rows = connection.execute(change).all()
        for row in rows:
            self._leases.written(_lease(row))
        return {row.id for row in rows}

    def release(self, runner: str) -> None:
        """Give all the runner's jobs back to the queue, and its webhooks to whoever looks for them next."""
        free_jobs = (
            sa.update(jobs)
            .where(jobs.c.lease_owner == runner, jobs.c.status == "in_progress")
            .values(status="queued", lease_owner=None, lease_s=None, heartbeat=jobs.c.heartbeat + 1)
        )
        free_webhooks = (
            sa.update(jobs)
            .where(jobs.c.webhook_taker == runner, jobs.c.webhook_due.is_not(None))
            .values(webhook_due=self._clock(), webhook_taker=None, webhook_attempts=jobs.c.webhook_attempts - 1)
        )
        with self._writing.begin() as connection:
            connection.execute(free_jobs)
            connection.execute(free_webhooks)

    def input_images(self, job_id: str) -> list[bytes]:
        images = tables.input_images
        select = sa.select(images.c.data).where(images.c.job_id == job_id).order_by(images.c.number)
        with self._engine.begin() as connection:
            return list(connection.execute(select).scalars())

    def checkpoints(self, job_id: str) -> dict[int, bytes]:
        """The last checkpoint of each of the job's requests that has one."""
        table = tables.checkpoints
        select = sa.select(table.c.request, table.c.data).where(table.c.job_id == job_id)
        with self._engine.begin() as connection:
            return {row.request: row.data for row in connection.execute(select)}

    def save_beginning(self, runner: str, job_id: str) -> None:
        """One of the runner's job's requests has begun; what it must not be too late for is behind it."""
        change = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.lease_owner == runner).values(start_by=None)
        with self._writing.begin() as connection:
            connection.execute(change)

    def save_progress(self, runner: str, job_id: str, progress: int, step: dict[str, Any]) -> None:
        """`progress` below 100, never taken back, and a `step` event. Raises LeaseLostError."""
        assert progress < 100, "only a completed job is at 100"
        with self._writing.begin() as connection:
            row = self._leased(connection, runner, job_id)
            progress = max(progress, row.progress)
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(progress=progress))
            self._append(connection, job_id, "step", {"progress": progress} | step)

    def save_event(self, runner: str, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """Something that happened to the runner's job. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            self._leased(connection, runner, job_id)
            self._append(connection, job_id, kind, data)

    def save_warnings(self, runner: str, job_id: str, warnings: Sequence[RequestWarning]) -> None:
        """Each that is new to the job, and a `warning` event of it. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            self._add_warnings(connection, self._leased(connection, runner, job_id), warnings)

    def save_checkpoint(self, runner: str, job_id: str, request: int, step: int, data: bytes) -> None:
        """Replace the request's checkpoint. Raises LeaseLostError."""
        table = tables.checkpoints
        with self._writing.begin() as connection:
            self._leased(connection, runner, job_id)
            where = (table.c.job_id == job_id, table.c.request == request)
            changed = connection.execute(sa.update(table).where(*where).values(step=step, data=data))
            if not changed.rowcount:
                connection.execute(sa.insert(table).values(job_id=job_id, request=request, step=step, data=data))
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(takeovers=0))

    def save_outputs(
        self,
        runner: str,
        job_id: str,
        request: int,
        outputs: Sequence[Output],
        seconds: dict[str, float],
        usage: Usage | None = None,
    ) -> None:
        """The files of one of the job's requests, which is done. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            row = self._leased(connection, runner, job_id)
            connection.execute(sa.insert(tables.outputs), [{"job_id": job_id} | asdict(output) for output in outputs])
            timings = (row.timings or {}) | {str(request): seconds}
            shown = dict(row.shown or {})
            if usage is not None:
                shown["usage"] = (shown.get("usage") or {}) | {str(request): asdict(usage)}
            values = {"timings": timings, "shown": shown, "takeovers": 0}
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
            pending = any(output.upload_pending for output in outputs)
            stored = {"request": request, "keys": [output.key for output in outputs]}
            self._append(connection, job_id, "stored", stored | {"upload": "pending" if pending else "done"})
            table = tables.checkpoints
            connection.execute(sa.delete(table).where(table.c.job_id == job_id, table.c.request == request))

    def complete(self, runner: str, job_id: str) -> None:
        """All its requests are done. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            self._leased(connection, runner, job_id)
            self._end(connection, job_id, "completed")

    def fail(self, runner: str, job_id: str, error: dict[str, Any]) -> None:
        """It cannot be done: `error` has a `code` and a `message`. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            self._leased(connection, runner, job_id)
            self._end(connection, job_id, "failed", error)

    # --- parts of transactions ---

    def _is_for_this_replica(self, is_free: sa.ColumnElement[bool], ended: Collection[str]) -> sa.ColumnElement[bool]:
        """While the application is changed, replicas with the old and with the new models share its jobs for a while.

        Those of an old model may be busy for long, with more jobs behind them. `ended`: jobs whose leases have ended.
        """
        if self._models is None:
            return sa.true()
        others = (jobs.c.application == self.application, jobs.c.model.not_in(self._models))
        free = sa.select(jobs.c.id, jobs.c.model).where(*others, is_free).order_by(jobs.c.created_at).limit(1000)
        leased = sa.select(jobs.c.id, jobs.c.model).where(
            *others, jobs.c.status == "in_progress", sa.func.coalesce(jobs.c.lease_s, EARLIER_LEASE_S) > FAILING_LEASE_S
        )
        with self._engine.begin() as connection:
            unserved = connection.execute(free).all()
            served = {row.model for row in connection.execute(leased) if row.id not in ended}
        now = self._monotonic()
        self._unserved_since = {
            row.id: now if row.model in served else self._unserved_since.get(row.id, now) for row in unserved
        }
        given_up = [job_id for job_id, since in self._unserved_since.items() if now - since >= UNSERVED_S]
        return sa.or_(jobs.c.model.is_(None), jobs.c.model.in_(self._models), jobs.c.id.in_(given_up))

    def _adopt(self) -> None:
        """Earlier versions put the name of the model behind that of the application: their rows are its own too."""
        keys = tables.idempotency_keys
        earlier_jobs, earlier_keys = (
            table.c.application.startswith(f"{self.application}/", autoescape=True) for table in (jobs, keys)
        )
        with self._engine.begin() as connection:
            if connection.execute(sa.select(jobs.c.id).where(earlier_jobs).limit(1)).scalar_one_or_none() is None:
                return
        with self._writing.begin() as connection:
            connection.execute(sa.update(jobs).where(earlier_jobs).values(application=self.application))
            select = sa.select(keys).join(jobs, jobs.c.id == keys.c.job_id).where(earlier_keys)
            rows = connection.execute(select.order_by(jobs.c.created_at)).all()
            connection.execute(sa.delete(keys).where(earlier_keys))
            own = sa.select(keys.c.owner, keys.c.key).where(keys.c.application == self.application)
            known = {(row.owner, row.key) for row in connection.execute(own)}
            latest = {(row.owner, row.key): row._asdict() | {"application": self.application} for row in rows}
            if moved := [values for key, values in latest.items() if key not in known]:
                connection.execute(sa.insert(keys), moved)

    def _insert(self, connection: sa.Connection, new: NewJob, idempotency_key: IdempotencyKey | None) -> None:
        now = self._clock()
        model = asked_from_json(new.requests).model or None
        connection.execute(
            sa.insert(jobs).values(
                id=new.id, application=self.application, model=model, kind=new.kind, owner=new.owner,
                status="queued", progress=0, created_at=now, requests=new.requests, shown=new.shown,
                timings={}, takeovers=0, sizes=new.sizes, is_awaited=new.is_awaited,
                webhook_url=new.webhook_url, webhook_target=_target(new.webhook_url),
                start_by=_later(now, new.limits.start_s), cancel_at=_later(now, new.limits.total_s),
            )
        )  # fmt: skip
        if new.input_images:
            rows = [{"job_id": new.id, "number": n, "data": data} for n, data in enumerate(new.input_images)]
            connection.execute(sa.insert(tables.input_images), rows)
        if idempotency_key is not None:
            connection.execute(
                sa.insert(tables.idempotency_keys).values(
                    application=self.application,
                    owner=new.owner,
                    key=idempotency_key.key,
                    body_digest=idempotency_key.body_digest,
                    job_id=new.id,
                )
            )
        row = self._row(connection, new.id)
        self._append(connection, new.id, "queued", {"position": self._position(connection, row)})
        if new.warnings:
            self._add_warnings(connection, row, new.warnings)

    def _add_warnings(self, connection: sa.Connection, row: sa.Row[Any], warnings: Sequence[RequestWarning]) -> None:
        known = list(row.warnings or [])
        for warning in map(asdict, warnings):
            if warning not in known:
                known.append(warning)
                self._append(connection, row.id, "warning", warning)
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(warnings=known))

    def _job_of_key(self, connection: sa.Connection, owner: str, idempotency_key: IdempotencyKey | None) -> str | None:
        if idempotency_key is None:
            return None
        keys = tables.idempotency_keys
        row = connection.execute(
            sa.select(keys.c.job_id, keys.c.body_digest).where(
                keys.c.application == self.application, keys.c.owner == owner, keys.c.key == idempotency_key.key
            )
        ).one_or_none()
        if row is None:
            return None
        if row.body_digest != idempotency_key.body_digest:
            raise ConflictError(
                "this Idempotency-Key was used before with another request", "Idempotency-Key", "idempotency_conflict"
            )
        return str(row.job_id)

    def _position(self, connection: sa.Connection, job: sa.Row[Any]) -> int:
        earlier = jobs.c.created_at < job.created_at
        before = sa.and_(jobs.c.is_awaited, earlier) if job.is_awaited else sa.or_(jobs.c.is_awaited, earlier)
        select = sa.select(sa.func.count()).where(
            jobs.c.application == self.application, jobs.c.status == "queued", before
        )
        return int(connection.execute(select).scalar_one())

    def _row(
        self,
        connection: sa.Connection,
        job_id: str,
        owner: str | None = None,
        param: str = "id",
        lock: bool = False,
    ) -> sa.Row[Any]:
        if not _ID.fullmatch(job_id):  # a database may refuse to look for it
            raise JobNotFoundError(f"there is no job {job_id[:96]!r}", param)
        select = sa.select(jobs).where(jobs.c.application == self.application, jobs.c.id == job_id)
        if owner is not None:
            select = select.where(jobs.c.owner == owner)
        row = connection.execute(select.with_for_update() if lock else select).one_or_none()
        if row is None:
            raise JobNotFoundError(f"there is no job {job_id[:96]!r}", param)
        return row

    def _leased(self, connection: sa.Connection, runner: str, job_id: str) -> sa.Row[Any]:
        """The job's row, locked until the transaction ends."""
        select = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.lease_owner == runner).with_for_update()
        row = connection.execute(select).one_or_none()
        if row is None:
            raise LeaseLostError(f"the job {job_id} is no longer this runner's")
        return row

    def _read(self, connection: sa.Connection, job_id: str, owner: str | None = None, param: str = "id") -> Job:
        [job] = self._with_outputs(connection, [self._row(connection, job_id, owner, param)])
        return job

    def _with_outputs(self, connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Job]:
        table = tables.outputs
        select = sa.select(table).where(table.c.job_id.in_([row.id for row in rows]))
        made: dict[str, list[Output]] = {row.id: [] for row in rows}
        for output in connection.execute(select.order_by(table.c.request, table.c.number)):
            values = output._asdict()
            made[values.pop("job_id")].append(Output(**values))
        return [_job(row, tuple(made[row.id])) for row in rows]

    def _end(self, connection: sa.Connection, job_id: str, status: Status, error: dict[str, Any] | None = None) -> None:
        assert status in ENDED
        now = self._clock()
        values: dict[str, Any] = {"progress": 100} if status == "completed" else {"error": error}
        values |= {"status": status, "completed_at": now, "expires_at": now + self.lifetime_s}
        values |= {"lease_owner": None, "lease_s": None}
        values["webhook_due"] = sa.case((jobs.c.webhook_url.is_not(None), now))
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
        connection.execute(sa.delete(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id))
        self._append(connection, job_id, status, {"error": error} if error else {"progress": 100})

    def _append(self, connection: sa.Connection, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """The next event; every caller has locked the job's row or has just made it."""
        events = tables.events
        number = connection.execute(_last_number(job_id)).scalar_one() + 1
        connection.execute(
            sa.insert(events).values(job_id=job_id, number=number, kind=kind, data=data, created_at=self._clock())
        )


_OF_THE_STORE = {"application", "model", "start_by", "cancel_at"}
_NOT_OF_A_JOB = {"lease_owner", "lease_s", "heartbeat", *_OF_THE_STORE} | {
    column.name for column in jobs.c if column.name.startswith("webhook_")
}


def _unfinished() -> sa.ColumnElement[bool]:
    return jobs.c.status.in_(("queued", "in_progress"))


def _job(row: sa.Row[Any], outputs: tuple[Output, ...]) -> Job:
    values = row._asdict()
    for name in [name for name in values if name in _NOT_OF_A_JOB]:
        del values[name]
    readable: dict[str, Any] = {"requests": [], "shown": {}, "timings": {}, "warnings": []}
    values |= {name: empty for name, empty in readable.items() if not isinstance(values[name], type(empty))}
    values |= {"sizes": _sizes(row.sizes), "warnings": warnings_from_json(values["warnings"])}
    return Job(**values, outputs=outputs)


def _later(now: float, seconds: float | None) -> float | None:
    return None if seconds is None else now + seconds


def _sizes(rows: list[list[int]] | None) -> list[Size]:
    return [(width, height, frames, steps) for width, height, frames, steps in rows or []]


def _lease(row: Any) -> Lease:
    return Lease(row.id, row.lease_owner, row.heartbeat, EARLIER_LEASE_S if row.lease_s is None else row.lease_s)


def _target(url: str | None) -> str | None:
    return None if url is None else urlsplit(url).netloc.lower()[:300]


def _last_number(job_id: str) -> sa.Select[int]:
    events = tables.events
    return sa.select(sa.func.coalesce(sa.func.max(events.c.number), 0)).where(events.c.job_id == job_id)


def _events(connection: sa.Connection, after: Mapping[str, int]) -> dict[str, list[Event]]:
    """Of each job those after the number that stands with it."""
    events = tables.events
    select = sa.select(events).where(events.c.job_id.in_(after), events.c.number > min(after.values()))
    found: dict[str, list[Event]] = {}
    for row in connection.execute(select.order_by(events.c.job_id, events.c.number)):
        if row.number > after[row.job_id]:
            event = Event(row.number, row.kind, row.data or {}, row.created_at)
            found.setdefault(row.job_id, []).append(event)
    return found
