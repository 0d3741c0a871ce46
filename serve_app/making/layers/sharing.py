"""Requests for the same work that are under way at the same time share one generation."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses

from deployments import tracing
from deployments.messages import Checkpoint, DenoisingProgress, GenerationRequest, Media, RequestWarning
from deployments.metrics.meter import NO_METER, Meter
from serve_app.making.follower import NOBODY, Follower, Make
from serve_app.making.layers.digest import work_digest
from serve_app.making.layers.layer import Layer

Key = tuple[str, int, bool]  # digest of the work, number of previews, whether progress is reported


class SharedGeneration(Follower):
    """A generation under way: it tells all who follow it."""

    def __init__(self, key: Key, first: Follower, warnings: tuple[RequestWarning, ...]) -> None:
        self.key = key
        self.warnings = warnings  # of the request that it began with
        self.wants_progress = first.wants_progress
        self.previews = first.previews
        self.resume_from = first.resume_from
        self.followers: list[Follower] = []
        self.has_begun = False
        self.trace = tracing.carried()  # of the request that it began with
        self.task: asyncio.Task[Media] | None = None

    def on_begin(self) -> None:
        self.has_begun = True
        for follower in self.followers:
            follower.on_begin()

    def on_progress(self, progress: DenoisingProgress) -> None:
        for follower in self.followers:
            follower.on_progress(progress)

    def on_warning(self, warning: RequestWarning) -> None:
        for follower in self.followers:
            follower.on_warning(warning)

    def on_wait(self, what_for: str, about_s: float | None = None) -> None:
        for follower in self.followers:
            follower.on_wait(what_for, about_s)

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        for follower in self.followers:
            follower.on_checkpoint(checkpoint)

    def on_preview(self, step: int, media: Media) -> None:
        for follower in self.followers:
            follower.on_preview(step, media)


class SharedGenerations:
    """Those of this process. A generation ends early when its last follower has left."""

    def __init__(self, make: Make, meter: Meter = NO_METER) -> None:
        self._make = make
        self._meter = meter
        self._under_way: dict[Key, SharedGeneration] = {}

    async def make(self, request: GenerationRequest, follower: Follower = NOBODY) -> Media:
        """What `make` makes; the same seed is a part of the same work."""
        digest = work_digest(request)
        shared = self._under_way.get((digest, follower.previews, True))  # one that reports serves all
        if shared is None and not follower.wants_progress:
            shared = self._under_way.get((digest, follower.previews, False))
        if shared is None:
            shared = self._start(digest, request, follower)
        else:
            self._meter.count("triptych_shared_total")
            span = tracing.current()
            if span:
                span.link(shared.trace)
                span.event("shared")
        assert shared.task is not None
        shared.followers.append(follower)
        shared.patience_s = max(shared.patience_s, follower.patience_s)
        if shared.has_begun:
            follower.on_begin()
        try:
            return _with_warnings_of(request, await asyncio.shield(shared.task), shared.warnings)
        finally:
            shared.followers.remove(follower)
            if not shared.followers:
                self._forget(shared)  # at once: what is being cancelled serves no newcomer
                shared.task.cancel()  # of no effect when it is done

    def _start(self, digest: str, request: GenerationRequest, first: Follower) -> SharedGeneration:
        shared = SharedGeneration((digest, first.previews, first.wants_progress), first, request.warnings)

        async def work() -> Media:
            try:
                return await self._make(request, shared)
            finally:
                self._forget(shared)

        # An empty context: it does not end with the HTTP request that began it, which others may share.
        context = tracing.carried_into(contextvars.Context())
        shared.task = asyncio.get_running_loop().create_task(work(), context=context)
        self._under_way[shared.key] = shared
        return shared

    def _forget(self, shared: SharedGeneration) -> None:
        if self._under_way.get(shared.key) is shared:
            del self._under_way[shared.key]


def _with_warnings_of(request: GenerationRequest, media: Media, others: tuple[RequestWarning, ...]) -> Media:
    """Media begin with the warnings of the request that they were made for: `others`, unless that was this one."""
    if request.warnings == others:
        return media
    return dataclasses.replace(media, warnings=(*request.warnings, *media.warnings[len(others) :]))


SHARING = Layer("sharing", lambda make, context: SharedGenerations(make, context.stages.meter).make)
