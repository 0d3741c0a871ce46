"""WAKING: a request for a model that is asleep wakes it, and waits until it is there."""

from __future__ import annotations

from functools import partial

from deployments.messages import GenerationRequest, Media
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext


def _wrap(make: Make, context: LayerContext) -> Make:
    sleep = context.stages.sleep

    async def when_awake(request: GenerationRequest, follower: Follower) -> Media:
        """Raises ModelLoadingError where that takes longer than the follower waits."""
        await sleep.awake(partial(follower.on_wait, "model"), follower.load_patience_s)
        with sleep.in_use():
            return await make(request, follower)

    return when_awake


WAKING = Layer("waking", _wrap)
