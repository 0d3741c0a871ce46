"""A span for each picture, video or sound that is made, where requests are traced."""

from __future__ import annotations

from typing import Any

from deployments import tracing
from deployments.adapters.use import named
from deployments.messages import GenerationRequest, Media
from serve_app.making.admission import compute_seconds
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext

MEASURES = ("width", "height", "num_frames")  # arguments


def trace_what_is_made(make: Make, context: LayerContext) -> Make:
    """`make` in a span."""

    async def make_and_trace(request: GenerationRequest, follower: Follower) -> Media:
        with tracing.span("make") as span:
            if span:
                span.set(**asked_of(request))
            media = await make(request, follower)
            span.set(device_s=compute_seconds(media.seconds))
            return media

    return make_and_trace


def asked_of(request: GenerationRequest) -> dict[str, Any]:
    """What it is, but for its words and files: these are its caller's."""
    arguments = request.arguments
    steps = request.num_steps or arguments.get("num_inference_steps")
    return {
        "request_id": request.request_id,
        "model": request.model,
        "kind": request.output.kind,
        "format": request.output.format,
        "steps": steps if isinstance(steps, int) else None,
        "seed": request.seed,
        "deterministic": request.deterministic,
        "deadline_s": request.deadline_s,
        "adapters": [each["name"] for each in named(request.features)] or None,
    } | {name: value for name in MEASURES if isinstance(value := arguments.get(name), int)}


TRACES = Layer("traces", trace_what_is_made)
