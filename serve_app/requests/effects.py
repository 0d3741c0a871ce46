"""Which of a request's arguments matter on this checkpoint: its encoder is asked once for each kind of request."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from deployments.errors import NotSupportedError
from deployments.messages import Effects, GenerationRequest, StageDescription
from serve_app.requests.bodies import MediaBody
from serve_app.requests.translate import asked_arguments, left_out

logger = logging.getLogger(__name__)

Judge = Callable[[GenerationRequest, tuple[str, ...]], Awaitable[Effects]]  # raises what a lost replica raises

KINDS = 2000  # of requests, whose effects are kept
TIMEOUT_S = 10.0  # from the first request of a kind: afterwards they go unchecked until the answer is there, and say so
SIZES = ("width", "height", "num_frames")  # they change neither what matters nor the number of steps


@dataclass(frozen=True)
class Question:
    """To the encoder, of one kind of request."""

    answer: asyncio.Task[Effects]
    waits_until: float  # in the time of the loop


class KnownEffects:
    """What was learned of each kind of request; those of one kind that come together wait for the same answer."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._questions: OrderedDict[str, Question] = OrderedDict()

    async def of(
        self, request: GenerationRequest, asked: tuple[str, ...], patience_s: float | None = None
    ) -> Effects | None:
        """None where the encoder does not answer in time, nor within the patience of this request."""
        loop = asyncio.get_running_loop()
        kind = kind_of(request.arguments, asked)
        question = self._questions.get(kind)
        if question is None:
            # An empty context: it does not end with the HTTP request that began it.
            answer = loop.create_task(self._ask(request, asked), context=contextvars.Context())
            question = self._questions[kind] = Question(answer, loop.time() + TIMEOUT_S)
        self._questions.move_to_end(kind)
        while len(self._questions) > KINDS:
            self._questions.popitem(last=False)
        left_s = question.waits_until - loop.time()
        try:
            return await asyncio.wait_for(
                asyncio.shield(question.answer), left_s if patience_s is None else min(left_s, patience_s)
            )
        except TimeoutError:
            return None
        except Exception as error:  # noqa: BLE001  (whatever a lost replica raises: the request itself meets another)
            if self._questions.get(kind) is question:
                del self._questions[kind]
            logger.warning("the effects of %s could not be learned: %s", sorted(request.arguments), error)
            return None

    async def _ask(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        return await self._judge(request, asked)


def kind_of(arguments: dict[str, Any], asked: tuple[str, ...]) -> str:
    """Equal for requests in which the same arguments matter and which make as many steps.

    Pipelines compare scales with 0 and 1, and count steps by whole numbers, shares (0..1) and lists of numbers.
    """
    kinds = {name: _kind(value) for name, value in arguments.items() if name not in SIZES}
    return json.dumps([sorted(asked), sorted(set(arguments) & set(SIZES)), kinds], sort_keys=True)


def _kind(value: Any) -> Any:
    if isinstance(value, float):
        return value if 0 <= value <= 1 else ("above 1" if value > 1 else "below 0")
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, str):
        return "text" if value else ""
    if isinstance(value, list) and any(isinstance(item, int | float) for item in value):
        return value
    if isinstance(value, list):
        return [_kind(item) for item in value]
    if isinstance(value, dict):
        return {name: _kind(item) for name, item in value.items()}
    return type(value).__name__


async def with_effects(
    requests: list[GenerationRequest],
    body: MediaBody,
    description: StageDescription,
    effects: KnownEffects,
    patience_s: float | None = None,
) -> list[GenerationRequest]:
    """The requests of the body with their number of steps, and without what changes nothing.

    They wait for that no longer than they may take, `patience_s` or the body's deadline.
    Raises NotSupportedError for an argument of the caller's without effect where the body is strict.
    """
    asked = asked_arguments(body, description)
    waits_s = min((each for each in (patience_s, body.deadline_s) if each is not None), default=None)
    known = await effects.of(requests[0], tuple(asked), waits_s)
    if known is None:
        body.warn("extra_args", "whether every argument has an effect could not be found in time", "not_checked")
        known = Effects()
    fields = {asked[name]: (name, why) for name, why in known.without.items() if name in asked}
    for field, (_, why) in fields.items():
        reason = f"{field} has no effect on {description.pipeline_class} in this request: {why}"
        body.refuse(NotSupportedError(reason, field))
    dropped = {name for name in known.without if name in asked}
    return [
        dataclasses.replace(
            request,
            arguments={name: value for name, value in request.arguments.items() if name not in dropped},
            num_steps=known.num_steps,
            warnings=body.warnings,
            left_out=left_out(body),
        )
        for request in requests
    ]
