"""Tells whose fault it is when a pipeline's own code fails: the caller's, where a request with default arguments works.

No list of arguments can say what a pipeline's code makes of each value. What is known is whether it works at all:
after any request that was made, or after a small default one, which is tried when the first request fails.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
from collections.abc import Iterable
from typing import Any

from deployments.errors import (
    GenerationFailedError,
    HandOffError,
    InvalidRequestError,
    NotNumbersError,
    PipelineFailedError,
)
from deployments.messages import GenerationRequest, InputFile, InputImage, InputSound, Media, StageDescription
from serve_app.errors import original_error
from serve_app.making.follower import NOBODY, Follower, Make
from serve_app.making.layers.default_request import default_requests
from serve_app.making.layers.layer import Layer, LayerContext
from serve_app.making.served_model import ServedModel

logger = logging.getLogger(__name__)

BODY_FIELD = {"width": "size", "height": "size"}  # by the pipeline's arguments
# Checked at the door, or sent with most requests: not the first to be suspected.
USUAL = ("width", "height", "num_inference_steps", "num_frames", "max_sequence_length", "guidance_scale")
MAX_VALUE_CHARS = 80


class CallersFaults:
    """Wraps `make`; remembers whether the model works."""

    def __init__(self, make: Make, model: ServedModel) -> None:
        self._make = make
        self._model = model
        self._works = False
        self._trial: asyncio.Task[bool] | None = None

    async def make(self, request: GenerationRequest, follower: Follower = NOBODY) -> Media:
        """Raises InvalidRequestError for what fails while the model works, GenerationFailedError where it does not."""
        try:
            media = await self._make(request, follower)
        except Exception as error:
            failure = original_error(error)
            if not isinstance(failure, PipelineFailedError):
                raise
            if not await self._default_works():
                raise GenerationFailedError(f"the model fails, also with default arguments: {failure}") from error
            logger.warning("request %s is refused, the pipeline's own code failed: %s", request.request_id, failure)
            description = await self._model.describe()
            raise refusal(failure, request, description, self._model.usual_arguments) from error
        self._works = True
        return media

    async def _default_works(self) -> bool:
        """As known from any request, or from a trial that all share whose requests fail meanwhile."""
        if self._works:
            return True
        if self._trial is None or self._trial.done():
            # An empty context: it does not end with the HTTP request that began it, nor within that one's limits.
            loop = asyncio.get_running_loop()
            self._trial = loop.create_task(self._try_defaults(), context=contextvars.Context())
            self._trial.add_done_callback(_note_failure)
        return await asyncio.shield(self._trial)

    async def _try_defaults(self) -> bool:
        description = await self._model.describe()
        for request in default_requests(description, self._model.name, self._model.usual_arguments):
            logger.info("a default request of %s is tried: does the model work?", sorted(request.arguments))
            try:
                await self._make(request, NOBODY)
            except Exception as error:
                if not isinstance(original_error(error), PipelineFailedError | HandOffError | InvalidRequestError):
                    raise
                logger.warning("a default request of %s fails", sorted(request.arguments), exc_info=error)
            else:
                self._works = True
                return True
        return False


def _note_failure(trial: asyncio.Task[bool]) -> None:
    """Also where nobody waits for it any more."""
    if not trial.cancelled() and (error := trial.exception()) is not None:
        logger.warning("whether the model works could not be tried: %s", error)


def refusal(
    failure: PipelineFailedError,
    request: GenerationRequest,
    description: StageDescription,
    usual_arguments: dict[str, Any],
) -> InvalidRequestError:
    """Names the argument at fault where it is known: the one that the error speaks of, or the only one given."""
    given = {
        name: value
        for name, value in request.arguments.items()
        if name != "prompt" and value != usual_arguments.get(name, description.parameters.get(name))
    }
    spoken_of = [name for name in given if re.search(rf"\b{name}\b", str(failure))]
    # An error while the arguments are read speaks of one of them; numbers may be lost by all of them together.
    alone = [] if isinstance(failure, NotNumbersError) else _unusual(given)
    suspects = _unusual(spoken_of) or spoken_of or alone or list(given)
    shown = ", ".join(f"{name}={_shown(given[name])}" for name in suspects) or "this prompt"
    if "inpainting" in description.tasks and suspects == ["image"] and "mask_image" not in request.arguments:
        suspects, shown = ["mask_image"], "a picture without mask_image"
    message = f"{description.pipeline_class} cannot use {shown} ({failure}); its own defaults work"
    param = suspects[0] if len(suspects) == 1 else None if suspects else "prompt"
    return InvalidRequestError(message, BODY_FIELD.get(param, param) if param else None, "unusable_arguments")


def _unusual(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in USUAL]


def _shown(value: Any) -> str:
    if isinstance(value, InputImage):
        return "a picture"
    if isinstance(value, list) and value and isinstance(value[0], InputImage):
        return f"{len(value)} pictures"
    if isinstance(value, InputSound):
        return "a sound"
    if isinstance(value, dict | list) and _holds_file(value):
        return "such files"
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def _holds_file(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, InputFile) or any(map(_holds_file, parts))


def tell_callers_faults(make: Make, context: LayerContext) -> Make:
    return CallersFaults(make, context.model).make


CALLERS_FAULTS = Layer("callers_faults", tell_callers_faults)
