"""A body becomes the requests that it stands for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from deployments import tracing
from deployments.messages import GenerationRequest, StageDescription
from serve_app.requests.bodies import MediaBody
from serve_app.requests.effects import KnownEffects, with_effects
from serve_app.requests.given.masks import with_markup, with_mask
from serve_app.requests.given.own_arguments import with_own_files, with_pipelines_names
from serve_app.requests.given.pictures import with_pictures
from serve_app.requests.given.sources import FileSource
from serve_app.requests.translate import Levels, to_generation_requests


async def parse(
    body: MediaBody,
    description: StageDescription,
    files: FileSource,
    model_name: str,
    default_arguments: dict[str, Any],
    quality: Levels,
    effects: KnownEffects,
    request_id: str | None = None,
    patience_s: float | None = None,
    loras: Sequence[dict[str, Any]] = (),
) -> list[GenerationRequest]:
    """The requests of a body, their files at hand; raises InvalidRequestError that names the field at fault.

    `patience_s`: how long it may take at most to learn which arguments have an effect; None: as long as for any.
    `loras`: those that the body names, as the stages read them.
    """
    limits, request_id = files.rules.limits, request_id or uuid.uuid4().hex
    asked = tracing.current()
    asked.set(request_id=request_id, model=model_name, tasks=list(description.tasks), n=getattr(body, "n", 1))
    with tracing.span("read"):
        body = with_pipelines_names(body, description)
        body = with_mask(await with_pictures(body, files), description, limits)
        body = await with_markup(body, limits)
        body = await with_own_files(body, description, files)
        requests = to_generation_requests(
            body, description, limits, request_id, model_name, default_arguments, quality, loras
        )
        return await with_effects(requests, body, description, effects, patience_s)
