"""Follower: one object that hears how a generation goes and says what it wants of it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from deployments.messages import Checkpoint, DenoisingProgress, GenerationRequest, Media, RequestWarning
from serve_app.deadlines import Deadlines


class Follower:
    """Hears of one generation; this one asks for nothing and hears nothing.

    A subclass sets what it asks for and overrides what it wants to hear. The methods are called in the event
    loop, so they must not block.
    """

    wants_progress: bool = False  # an event after each step
    previews: int = 0  # pictures to show on the way
    resume_from: Checkpoint | None = None  # where an earlier generation of the same work got to
    deadlines: Deadlines | None = None  # by which it must have begun, and be done
    patience_s: float = 0.0  # that it waits, without getting further, for a device that is full of other work
    load_patience_s: float = math.inf  # that it waits for a model that was asleep

    def on_begin(self) -> None:
        """A denoiser has taken it up; again after the death of one."""
        if self.deadlines is not None:
            self.deadlines.begin()

    def on_progress(self, progress: DenoisingProgress) -> None:
        """A step is done."""

    def on_warning(self, warning: RequestWarning) -> None:
        """A stage noticed something that the caller should know; the media have it too."""

    def on_wait(self, what_for: str, about_s: float | None = None) -> None:
        """It waits, for the memory of a device ("device") or for a model that was asleep ("model"); jobs also for a
        "denoiser" and the "storage".

        `about_s`: seconds that this should take; None: not known.
        """

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """The denoising can go on from here, whatever dies; the bytes are in this process."""

    def on_preview(self, step: int, media: Media) -> None:
        """What would come out if `step` were the last."""


NOBODY = Follower()

Make = Callable[[GenerationRequest, Follower], Awaitable[Media]]  # serve_app.making.generate, and what wraps it
