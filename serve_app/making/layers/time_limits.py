"""TIME_LIMITS: no request takes longer than its caller gives it."""

from __future__ import annotations

from deployments.messages import GenerationRequest, Media
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext


def _wrap(make: Make, context: LayerContext) -> Make:
    async def in_time(request: GenerationRequest, follower: Follower) -> Media:
        if follower.deadlines is None:
            return await make(request, follower)
        return await follower.deadlines.keep(lambda: make(request, follower))

    return in_time


TIME_LIMITS = Layer("time limits", _wrap)
