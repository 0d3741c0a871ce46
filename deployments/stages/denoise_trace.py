"""What the span of a denoising tells: how far it came, with whom it shared batches, and what happened on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from deployments.adapters.use import named
from deployments.errors import DeadlineExceededError
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.messages import Checkpoint, DecodeInputs
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.tracing import Span


@contextmanager
def traced(follower: DenoisingFollower, span: Span) -> Iterator[DenoisingFollower]:
    """A follower that tells the span too; the same one where nobody records it."""
    if not span:
        yield follower
        return
    runs: list[DenoiseRun] = []

    def started(run: DenoiseRun) -> None:
        runs[:] = [run]
        if run.session.resumed_at:
            span.event("resumed", first_step=run.session.resumed_at)
        if follower.started:
            follower.started(run)

    def checkpoint(made: Checkpoint) -> None:
        span.event("checkpoint", step=made.step, bytes_out=made.content.num_bytes)
        assert follower.checkpoint is not None
        follower.checkpoint(made)

    def preview(step: int, inputs: DecodeInputs) -> None:
        span.event("preview", step=step)
        assert follower.preview is not None
        follower.preview(step, inputs)

    try:
        yield replace(
            follower,
            started=started,
            checkpoint=checkpoint if follower.checkpoint else None,
            preview=preview if follower.preview else None,
        )
    except DeadlineExceededError:
        span.event("deadline passed")
        raise
    finally:
        for run in runs:
            tell(span, run)


def tell(span: Span, run: DenoiseRun) -> None:
    """At its end, however that came."""
    fiber, request = run.fiber, run.request
    cached = [each.reused for each in run.measured if isinstance(each, CachedSteps)]
    span.set(
        steps=run.session.steps_done - run.session.resumed_at,
        first_step=run.session.resumed_at,
        forwards=fiber.forwards,
        merged_forwards=fiber.merged_forwards,
        passes_together=fiber.passes_together,
        mean_batch=fiber.batched_forwards / fiber.forwards if fiber.forwards else None,
        max_batch=fiber.largest_batch,
        batch_mates=len(fiber.mates),
        device_s=fiber.seconds,
        cached_steps=sum(cached) if cached else None,
        adapters=[each["name"] for each in named(request.features)] or None,
        deadline_s=request.deadline_s,
    )
