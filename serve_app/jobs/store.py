"""The durable store of jobs: every method is one transaction, and may be called from any thread.

A runner that works on a job holds a lease on it and renews it. What it writes counts only while the lease
is its own, so a runner that was thought dead can spoil nothing. Clocks of machines that share a store must
agree to within a small part of the lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from deployments.messages import RequestWarning
from serve_app.errors import ConflictError, JobNotFoundError, LeaseLostError
from serve_app.jobs import tables
from serve_app.jobs.codec import warnings_from_json
from serve_app.jobs.database import writing
from serve_app.jobs.records import ENDED, Event, IdempotencyKey, Job, NewJob, Output, Status, UnfinishedJob, Webhook
from serve_app.making.admission import Size

jobs = tables.jobs


class JobStore:
    """The jobs of one application in a database that others may share; `lifetime_s` counts from a job's end."""

    def __init__(
        self,
        engine: sa.Engine,
        application: str = "",
        lifetime_s: float = 86_400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.application = application
        self.lifetime_s = lifetime_s
        self._engine = engine
        self._writing = writing(engine)
        self._clock = clock

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
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs by the time they were asked for, from the one after `after`; and if there are more.

        Raises JobNotFoundError for an unknown `after`.
        """
        with self._engine.begin() as connection:
            select = sa.select(jobs).where(jobs.c.application == self.application, jobs.c.owner == owner)
            if kind is not None:
                select = select.where(jobs.c.kind == kind)
            place = sa.tuple_(jobs.c.created_at, jobs.c.id)
            if after is not None:
                last = self._read(connection, after, owner, "after")
                mark = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                select = select.where(place > mark if order == "asc" else place < mark)
            direction = sa.asc if order == "asc" else sa.desc
            select = select.order_by(direction(jobs.c.created_at), direction(jobs.c.id)).limit(limit + 1)
            rows = connection.execute(select).all()
            return self._with_outputs(connection, rows[:limit]), len(rows) > limit

    def events_after(self, job_id: str, number: int) -> list[Event]:
        """What happened to the job after its event `number`."""
        events = tables.events
        select = sa.select(events.c.number, events.c.kind, events.c.data, events.c.created_at)
        select = select.where(events.c.job_id == job_id, events.c.number > number).order_by(events.c.number)
        with self._engine.begin() as connection:
            rows = connection.execute(select).all()
        return [Event(row.number, row.kind, row.data or {}, row.created_at) for row in rows]

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs are started before it; None when it does not wait."""
        with self._engine.begin() as connection:
            row = self._row(connection, job_id)
            return self._position(connection, row.created_at) if row.status == "queued" else None

    def count(self, status: Status) -> int:
        """How many jobs have this status."""
        select = sa.select(sa.func.count()).where(jobs.c.application == self.application, jobs.c.status == status)
        with self._engine.begin() as connection:
            return int(connection.execute(select).scalar_one())

    def unfinished(self) -> list[UnfinishedJob]:
        """All that wait or run."""
        select = sa.select(jobs.c.id, jobs.c.owner, jobs.c.lease_owner, jobs.c.sizes)
        select = select.where(jobs.c.application == self.application, jobs.c.status.in_(("queued", "in_progress")))
        with self._engine.begin() as connection:
            return [UnfinishedJob(*row[:3], _sizes(row.sizes)) for row in connection.execute(select)]

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
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
                error = {"code": "cancelled", "message": "the job was cancelled"}
                self._end(connection, job_id, "cancelled", error)
            return job

    def delete(self, job_id: str, owner: str | None = None) -> Job:
        """The job as it was; its record is gone and its runner stops. Raises JobNotFoundError."""
        with self._writing.begin() as connection:
            self._row(connection, job_id, owner, lock=True)
            job = self._read(connection, job_id)
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
            return job

    def expired(self, limit: int = 100) -> list[str]:
        """Jobs whose time is over."""
        select = sa.select(jobs.c.id).where(jobs.c.application == self.application, jobs.c.expires_at < self._clock())
        with self._engine.begin() as connection:
            return list(connection.execute(select.limit(limit)).scalars())

    def mark_uploaded(self, key: str) -> None:
        """The output of this key is in the storage now."""
        change = sa.update(tables.outputs).where(tables.outputs.c.key == key).values(upload_pending=False)
        with self._writing.begin() as connection:
            connection.execute(change)

    def take_webhooks(self, limit: int, again_after_s: float) -> list[Webhook]:
        """The webhooks that are due. The taker has `again_after_s` to deliver one; then it is due again."""
        now = self._clock()
        due = (
            sa.select(jobs.c.id)
            .where(jobs.c.application == self.application, jobs.c.webhook_due <= now)
            .order_by(jobs.c.webhook_due)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        columns = (jobs.c.id, jobs.c.kind, jobs.c.status, jobs.c.completed_at, jobs.c.webhook_url)
        with self._writing.begin() as connection:
            ids = list(connection.execute(due).scalars())
            change = sa.update(jobs).where(jobs.c.id.in_(ids)).values(webhook_due=now + again_after_s)
            return [Webhook(*row) for row in connection.execute(change.returning(*columns))] if ids else []

    def webhook_done(self, job_id: str) -> None:
        """It was delivered, or given up."""
        with self._writing.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(webhook_due=None))

    # --- what runners do ---

    def claim(self, runner: str, lease_s: float) -> Job | None:
        """The job that waits longest, or whose lease or pause has ended; it is now leased to `runner`."""
        now = self._clock()
        abandoned = sa.and_(jobs.c.status == "in_progress", jobs.c.lease_until < now)
        first = (
            sa.select(jobs.c.id)
            .where(jobs.c.application == self.application, sa.or_(jobs.c.status == "queued", abandoned))
            .order_by(jobs.c.created_at, jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._writing.begin() as connection:
            job_id = connection.execute(first).scalar_one_or_none()
            if job_id is None:
                return None
            row = self._row(connection, job_id)
            taken_over = row.lease_owner is not None
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    status="in_progress",
                    started_at=row.started_at or now,
                    lease_owner=runner,
                    lease_until=now + lease_s,
                    takeovers=row.takeovers + taken_over,
                )
            )
            self._append(connection, job_id, "in_progress", {"taken_over": taken_over})
            return self._read(connection, job_id)

    def renew(self, runner: str, job_ids: Iterable[str], lease_s: float) -> set[str]:
        """Those of the jobs that are still the runner's, for `lease_s` more seconds."""
        change = (
            sa.update(jobs)
            .where(jobs.c.id.in_(list(job_ids)), jobs.c.lease_owner == runner)
            .values(lease_until=self._clock() + lease_s)
            .returning(jobs.c.id)
        )
        with self._writing.begin() as connection:
            return set(connection.execute(change).scalars())

    def postpone(self, runner: str, job_id: str, seconds: float) -> None:
        """Nobody works on the runner's job for so long; its next runner does not take it over from one that died."""
        change = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.lease_owner == runner)
            .values(lease_owner=None, lease_until=self._clock() + seconds)
        )
        with self._writing.begin() as connection:
            connection.execute(change)

    def release(self, runner: str) -> None:
        """Give all the runner's jobs back to the queue."""
        change = (
            sa.update(jobs)
            .where(jobs.c.lease_owner == runner, jobs.c.status == "in_progress")
            .values(status="queued", lease_owner=None, lease_until=None)
        )
        with self._writing.begin() as connection:
            connection.execute(change)

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

    def save_progress(self, runner: str, job_id: str, progress: int, step: dict[str, Any]) -> None:
        """`progress` below 100, never taken back, and a `step` event. Raises LeaseLostError."""
        assert progress < 100, "only a completed job is at 100"
        with self._writing.begin() as connection:
            row = self._leased(connection, runner, job_id)
            progress = max(progress, row.progress)
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(progress=progress))
            self._append(connection, job_id, "step", {"progress": progress} | step)

    def save_preview(self, runner: str, job_id: str, preview: dict[str, Any]) -> None:
        """A `preview` event. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            self._leased(connection, runner, job_id)
            self._append(connection, job_id, "preview", preview)

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
        self, runner: str, job_id: str, request: int, outputs: Sequence[Output], seconds: dict[str, float]
    ) -> None:
        """The files of one of the job's requests, which is done. Raises LeaseLostError."""
        with self._writing.begin() as connection:
            row = self._leased(connection, runner, job_id)
            connection.execute(sa.insert(tables.outputs), [{"job_id": job_id} | asdict(output) for output in outputs])
            timings = (row.timings or {}) | {str(request): seconds}
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(timings=timings, takeovers=0))
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

    def _insert(self, connection: sa.Connection, new: NewJob, idempotency_key: IdempotencyKey | None) -> None:
        now = self._clock()
        connection.execute(
            sa.insert(jobs).values(
                id=new.id, application=self.application, kind=new.kind, owner=new.owner, status="queued", progress=0,
                created_at=now, requests=new.requests, shown=new.shown, timings={}, takeovers=0,
                webhook_url=new.webhook_url, sizes=new.sizes,
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
        self._append(connection, new.id, "queued", {"position": self._position(connection, now)})
        if new.warnings:
            self._add_warnings(connection, self._row(connection, new.id), new.warnings)

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

    def _position(self, connection: sa.Connection, created_at: float) -> int:
        select = sa.select(sa.func.count()).where(
            jobs.c.application == self.application, jobs.c.status == "queued", jobs.c.created_at < created_at
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
        values |= {"lease_owner": None, "lease_until": None}
        values["webhook_due"] = sa.case((jobs.c.webhook_url.is_not(None), now))
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
        connection.execute(sa.delete(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id))
        self._append(connection, job_id, status, {"error": error} if error else {"progress": 100})

    def _append(self, connection: sa.Connection, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """The next event; every caller has locked the job's row or has just made it."""
        events = tables.events
        last = sa.select(sa.func.coalesce(sa.func.max(events.c.number), 0)).where(events.c.job_id == job_id)
        number = connection.execute(last).scalar_one() + 1
        connection.execute(
            sa.insert(events).values(job_id=job_id, number=number, kind=kind, data=data, created_at=self._clock())
        )


def _job(row: sa.Row[Any], outputs: tuple[Output, ...]) -> Job:
    values = row._asdict()
    for name in ("application", "lease_owner", "lease_until", "webhook_url", "webhook_due"):
        del values[name]
    readable: dict[str, Any] = {"requests": [], "shown": {}, "timings": {}, "warnings": []}
    values |= {name: empty for name, empty in readable.items() if not isinstance(values[name], type(empty))}
    values |= {"sizes": _sizes(row.sizes), "warnings": warnings_from_json(values["warnings"])}
    return Job(**values, outputs=outputs)


def _sizes(rows: list[list[int]] | None) -> list[Size]:
    return [(width, height, frames, steps) for width, height, frames, steps in rows or []]
