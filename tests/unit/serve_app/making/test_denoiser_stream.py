"""The denoiser's stream: a payload counts when it has been read, and an error is never one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError, RayActorError

from deployments.errors import GenerationFailedError
from deployments.messages import Checkpoint, DecodeInputs, DenoisingProgress, Packed, PayloadFollows
from serve_app.making.denoiser_stream import CheckpointArrived, DecodeInputsArrived, DenoiserStream, PreviewArrived
from tests.support.played_stages import Stream

INPUTS = DecodeInputs("result", Packed(None))
DEATHS = (RayActorError(), ObjectLostError("id", None, "call"))  # type: ignore[no-untyped-call]


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint("request", step, "fingerprint", "digest", Packed(None))


PARTS: dict[str, list[Any]] = {
    "progress": [DenoisingProgress(1, 9)],
    "checkpoint": [PayloadFollows("checkpoint", 1), checkpoint(1)],
    "preview": [PayloadFollows("preview", 1), INPUTS],
}
END = [PayloadFollows("decode_inputs", 9, {"denoise": 1.0}), INPUTS]


def read(items: list[Any]) -> tuple[list[Any], BaseException | None]:
    """The events, and what ended them."""

    async def each() -> AsyncIterator[Any]:
        for item in items:
            yield item

    async def events() -> tuple[list[Any], BaseException | None]:
        seen = []
        try:
            async for event in DenoiserStream(Stream(each())).events():
                seen.append(event)
        except (GenerationFailedError, *map(type, DEATHS)) as error:
            return seen, error
        return seen, None

    return asyncio.run(events())


def kinds(events: list[Any]) -> list[str]:
    names = {DenoisingProgress: "progress", CheckpointArrived: "checkpoint", PreviewArrived: "preview"}
    return [names.get(type(event), "end") for event in events]


def test_the_last_event_carries_the_inputs_and_where_they_lie() -> None:
    [event], error = read(END)
    assert error is None
    assert isinstance(event, DecodeInputsArrived)
    assert (event.inputs, event.reference.value, event.seconds) == (INPUTS, INPUTS, {"denoise": 1.0})


def test_nothing_after_the_last_event_is_read() -> None:
    events, error = read([*END, DEATHS[0]])
    assert (kinds(events), error) == (["end"], None)


@given(st.lists(st.sampled_from(sorted(PARTS)), max_size=6), st.integers(0, 12), st.sampled_from(DEATHS))
def test_a_death_at_any_item_ends_the_events_with_what_was_read_before_it(
    parts: list[str], items_before: int, death: Exception
) -> None:
    items = [item for part in parts for item in PARTS[part]] + END
    before = items[:items_before]
    events, error = read([*before, death])
    whole = [*parts, "end"]
    if len(before) == len(items):
        assert (kinds(events), error) == (whole, None)
    else:
        assert error is death
        assert kinds(events) == whole[: len(events)]
        announced = sum(isinstance(item, PayloadFollows) for item in before)
        assert len(events) == len(before) - announced


@pytest.mark.parametrize("announced", ["checkpoint", "preview", "decode_inputs"])
def test_something_else_than_was_announced_is_a_failure(announced: Any) -> None:
    wrong = INPUTS if announced == "checkpoint" else checkpoint(1)
    events, error = read([PayloadFollows(announced, 1), wrong])
    assert events == []
    assert isinstance(error, GenerationFailedError)
    assert announced in str(error)


def test_a_stream_that_ends_before_its_last_event_is_a_failure() -> None:
    events, error = read(PARTS["checkpoint"])
    assert kinds(events) == ["checkpoint"]
    assert isinstance(error, GenerationFailedError)
