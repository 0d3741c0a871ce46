"""Makes what a caller waits for: let in by the admission, made, and measured."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from deployments import tracing
from deployments.messages import GenerationRequest, Media
from serve_app.deadlines import NO_LIMITS, Deadlines, TimeLimits
from serve_app.making.admission import Admission, Ticket
from serve_app.making.follower import Follower, Make
from serve_app.making.served_model import ServedModel

Tasks = dict[asyncio.Task[Media], GenerationRequest]
Then = Callable[[GenerationRequest, Media], Awaitable[object]]


@dataclass(frozen=True)
class MakeAtOnce:
    """Begins requests in the order in which they come, as long as there is room for them."""

    make: Make
    admission: Admission
    model: ServedModel

    async def all(
        self, requests: Sequence[GenerationRequest], caller: str, limits: TimeLimits = NO_LIMITS
    ) -> list[Media]:
        """The media of each request. When one fails, or the caller hangs up, the others end too.

        Raises what `start` and `make` raise.
        """
        followers = [Follower() for _ in requests]
        for each in followers:  # nobody can be told meanwhile how long it takes
            each.load_patience_s = self.model.stages.sleep.max_wait_s
        tasks = await self.start(requests, caller, followers, limits=limits)
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # of no effect on those that are done

    async def start(
        self,
        requests: Sequence[GenerationRequest],
        caller: str,
        followers: Sequence[Follower],
        then: Then | None = None,
        limits: TimeLimits = NO_LIMITS,
    ) -> Tasks:
        """A task for each request, all let in or none; `then` is a part of each task, `limits` are those of all.

        `caller` is the label of an API key. Raises OverloadedError, and InvalidRequestError for what no empty
        queue could take.
        """
        tickets = self.admission.admit(list(requests), await self.model.describe(), caller)
        note_admitted(self.admission)
        deadlines = None if limits == NO_LIMITS else Deadlines(limits)
        tasks = {}
        for request, ticket, follower in zip(requests, tickets, followers, strict=True):
            follower.deadlines = deadlines
            task = asyncio.ensure_future(self._make(request, ticket, follower, then))
            task.add_done_callback(ticket.close)
            tasks[task] = request
        return tasks

    async def _make(self, request: GenerationRequest, ticket: Ticket, follower: Follower, then: Then | None) -> Media:
        media = await self.make(request, follower)
        ticket.learn(media)
        if then is not None:
            await then(request, media)
        return media


def note_admitted(admission: Admission) -> None:
    """In the span of the HTTP request."""
    if span := tracing.current():
        span.event("admitted", queue_s=admission.queue_s(), pending=admission.num_pending)
