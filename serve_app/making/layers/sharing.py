"""Requests for the same work that are under way at the same time share one generation."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray import ObjectRef

from deployments.messages import Checkpoint, DenoisingProgress, GenerationRequest, Media
from serve_app.making.generate import OnCheckpoint, OnPreview, OnProgress
from serve_app.making.layers.digest import work_digest


class Generate(Protocol):
    """serve_app.making.generate.generate, bound to the stages."""

    def __call__(
        self,
        request: GenerationRequest,
        on_progress: OnProgress | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        resume_from: Checkpoint | None = None,
        on_preview: OnPreview | None = None,
    ) -> Awaitable[Media]: ...


@dataclass(eq=False)
class Listener:
    """One of those who wait for a generation."""

    on_progress: OnProgress | None
    on_checkpoint: OnCheckpoint | None
    on_preview: OnPreview | None


@dataclass(eq=False)
class SharedGeneration:
    """A generation under way and all who wait for it."""

    task: asyncio.Task[Media] | None = None
    listeners: list[Listener] = field(default_factory=list)

    def on_progress(self, progress: DenoisingProgress) -> None:
        for listener in self.listeners:
            if listener.on_progress is not None:
                listener.on_progress(progress)

    def on_checkpoint(self, reference: ObjectRef[Any], step: int) -> None:
        for listener in self.listeners:
            if listener.on_checkpoint is not None:
                listener.on_checkpoint(reference, step)

    def on_preview(self, step: int, media: Media) -> None:
        for listener in self.listeners:
            if listener.on_preview is not None:
                listener.on_preview(step, media)


class SharedGenerations:
    """Those of this process. A generation ends early when nobody is left who waits for it."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._followed: dict[str, SharedGeneration] = {}  # by digest; these report steps and checkpoints
        self._silent: dict[str, SharedGeneration] = {}

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: OnProgress | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        resume_from: Checkpoint | None = None,
        on_preview: OnPreview | None = None,
    ) -> Media:
        """As serve_app.making.generate.generate; the same seed is a part of the same work."""
        digest, listener = work_digest(request), Listener(on_progress, on_checkpoint, on_preview)
        shared = self._followed.get(digest)
        if shared is None and on_progress is None:
            shared = self._silent.get(digest)
        if shared is None:
            shared = self._start(digest, request, listener, resume_from)
        assert shared.task is not None
        shared.listeners.append(listener)
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.listeners.remove(listener)
            if not shared.listeners:
                shared.task.cancel()  # of no effect when it is done

    def _start(
        self, digest: str, request: GenerationRequest, listener: Listener, resume_from: Checkpoint | None
    ) -> SharedGeneration:
        shared = SharedGeneration()
        is_followed = listener.on_progress is not None
        group = self._followed if is_followed else self._silent

        async def work() -> Media:
            try:
                if is_followed:
                    return await self._generate(
                        request, shared.on_progress, shared.on_checkpoint, resume_from, shared.on_preview
                    )
                return await self._generate(request, on_preview=shared.on_preview)
            finally:
                if group.get(digest) is shared:
                    del group[digest]

        # An empty context: it does not end with the HTTP request that began it, which others may share.
        shared.task = asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
        group[digest] = shared
        return shared
