"""Keeps admission control in step with the job store: every unfinished job holds tickets here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from deployments.messages import Media
from serve_app.jobs.records import Job
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import StoreThreads
from serve_app.making.admission import Admission, AdmissionArgs, Size, Ticket

PAUSE_S = 1.0  # between looks at what other replicas have taken, begun or ended


class JobLedger:
    """The tickets of every job that has not ended, whichever replica took it or runs it, from one start to the next."""

    def __init__(
        self, admissions: Mapping[str, Admission], store: JobStore, threads: StoreThreads, runner: str
    ) -> None:
        """`admissions`: by model."""
        self._admissions = admissions
        self._unserved = Admission(AdmissionArgs())  # jobs of models that are no longer served are in nobody's way
        self._store = store
        self._threads = threads
        self._runner = runner  # the name of this replica's
        self._tickets: dict[str, list[Ticket]] = {}
        self._being_stored: set[str] = set()
        self._running_here: set[str] = set()
        self._running_elsewhere: set[str] = set()

    @contextmanager
    def entering(self, job_id: str, model: str, sizes: Sequence[Size], owner: str, is_awaited: bool) -> Iterator[None]:
        """Around the storing of a new job, which does not begin where there is no room.

        Raises OverloadedError, and InvalidRequestError for a job that no empty queue could take.
        """
        self._tickets[job_id] = self._admission_of(model).admit_job(sizes, owner, is_awaited)
        self._being_stored.add(job_id)
        try:
            yield
        except BaseException:
            self.close(job_id)
            raise
        finally:
            self._being_stored.remove(job_id)

    def close(self, job_id: str) -> None:
        """It has ended, or was never stored; `look` forgets it."""
        for ticket in self._tickets.get(job_id, ()):
            ticket.close()

    def begun(self, job: Job) -> None:
        """The runner of this replica has taken it."""
        self._running_here.add(job.id)
        for ticket in self._tickets_of(job.id, job.asked.model, job.sizes, job.owner, job.is_awaited):
            ticket.is_waiting, ticket.is_elsewhere = False, False

    def ended(self, job_id: str) -> None:
        """The runner of this replica is done with it, or has given it back."""
        self._running_here.discard(job_id)

    def are_behind(self, model: str) -> bool:
        """Whether jobs of this model that nobody waits for have less than their share while callers wait."""
        return self._admission_of(model).jobs_are_behind()

    def made(self, job: Job, request: int, media: Media) -> None:
        """One of the job's requests was made by this replica."""
        tickets = self._tickets_of(job.id, job.asked.model, job.sizes, job.owner, job.is_awaited)
        if request < len(tickets):
            tickets[request].learn(media)
            tickets[request].close()

    async def keep(self) -> None:
        """To be repeated without end."""
        await self.look()
        await asyncio.sleep(PAUSE_S)

    async def look(self) -> None:
        """Bring the tickets in line with the store."""
        known = self._tickets.keys() - self._being_stored
        unfinished = {job.id: job for job in await self._threads.run(self._store.unfinished)}
        for job_id in known - unfinished.keys():
            tickets = [ticket for ticket in self._tickets.pop(job_id) if ticket.is_open]
            if job_id in self._running_elsewhere:  # what it took is not known here, so the prediction stands for it
                for admission in {ticket.admission for ticket in tickets}:
                    admission.count_work(sum(ticket.cost_s for ticket in tickets))
            for ticket in tickets:
                ticket.close()
        for job in unfinished.values():
            for ticket in self._tickets_of(job.id, job.model, job.sizes, job.owner, job.is_awaited):
                is_here = job.id in self._running_here  # what the store said may be from before
                ticket.is_waiting = job.runner is None and not job.is_awaited and not is_here
                ticket.is_elsewhere = job.runner not in (None, self._runner) and not is_here
        self._running_elsewhere = {
            job.id for job in unfinished.values() if job.runner is not None and job.runner != self._runner
        }

    def _tickets_of(
        self, job_id: str, model: str | None, sizes: Sequence[Size], owner: str, is_awaited: bool
    ) -> list[Ticket]:
        if job_id not in self._tickets:
            self._tickets[job_id] = self._admission_of(model).enter_job(sizes, owner, is_awaited)
        return self._tickets[job_id]

    def _admission_of(self, model: str | None) -> Admission:
        """Rows without a model are of a version that served but one."""
        return self._admissions.get(model, self._unserved) if model else next(iter(self._admissions.values()))
