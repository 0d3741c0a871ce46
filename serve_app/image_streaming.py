"""Pictures as server-sent events, in the shape that OpenAI's client reads with `stream=True`."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from deployments.errors import NotSupportedError
from deployments.messages import GenerationRequest, Media
from serve_app.error_handlers import error_answer
from serve_app.schemas import ImageGenerationBody

StreamPrefix = Literal["image_generation", "image_edit"]
Tasks = dict[asyncio.Task[Media], GenerationRequest]

KEEP_ALIVE_S = 15.0  # between comments that keep proxies from closing a quiet connection
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def without_stream(body: ImageGenerationBody) -> ImageGenerationBody:
    """The body of the same pictures, not streamed. Raises NotSupportedError for what cannot be streamed."""
    if body.partial_images:
        raise NotSupportedError(
            f"partial_images={body.partial_images} is not supported, only 0: no previews are made while denoising",
            "partial_images",
        )
    if body.response_format == "url":
        raise NotSupportedError("response_format must be 'b64_json' with stream: true", "response_format")
    return body.model_copy(update={"stream": None, "partial_images": None})


async def picture_events(
    prefix: StreamPrefix, tasks: Tasks, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncIterator[bytes]:
    """A `completed` event for each picture, in the order in which they are done.

    A failure ends the stream with an `error` event; when the caller hangs up, what is under way is cancelled.
    """
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield b": still working\n\n"
            for task in done:
                failure = task.exception()
                if isinstance(failure, Exception):
                    yield _event("error", json.loads(bytes(error_answer(failure).body)))
                    return
                for event in _completed(prefix, tasks[task], task.result()):
                    yield _event(event["type"], event)
    finally:
        for task in tasks:
            task.cancel()  # of no effect on those that are done


def _completed(prefix: StreamPrefix, request: GenerationRequest, media: Media) -> list[dict[str, Any]]:
    return [
        {
            "type": f"{prefix}.completed",
            "b64_json": base64.b64encode(file.data).decode(),
            "created_at": int(time.time()),
            "size": f"{file.width}x{file.height}",
            "output_format": request.output.format,
            "quality": "auto",
            "background": "opaque",
            "usage": NO_TOKENS,  # OpenAI's unit of billing; nothing is billed here
            "seed": request.seed,
            "timings": media.seconds,
        }
        for file in media.files
    ]


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
