"""The calls of the stages in a trace, where replicas die and hand-offs fail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments import tracing
from deployments.errors import HandOffError, ReplicaRefusedError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingBegun,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    PayloadFollows,
)
from serve_app.making import generate as generate_module
from serve_app.making.generate import generate
from serve_app.making.stages import Stages
from tests.support.played_stages import Method, Reference, Stream
from tests.support.traced import Traces, attributes_of, events_of, id_of, parent_of, trace_of, traces

__all__ = ["traces"]

REQUEST = GenerationRequest("request", "model", {}, 0, OutputFormat("image", "png"))
CHECKPOINT = [PayloadFollows("checkpoint", 3), Checkpoint("request", 3, "print", "digest", Packed(None))]
DONE = [PayloadFollows("decode_inputs", 5), DecodeInputs("result", Packed(None))]


class Stage:
    """Answers with what was prepared, one call after another, and keeps the envelopes."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.envelopes: list[Envelope] = []
        self.encode = self.denoise = self.decode = Method(self._answer)

    def options(self, **_: Any) -> Stage:
        return self

    def _answer(self, *arguments: Any) -> Any:
        self.envelopes += [each for each in arguments if isinstance(each, Envelope)]
        answer = self.answers.pop(0)
        return Stream(each_of(answer)) if isinstance(answer, list) else Reference(answer)


async def each_of(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(times: int) -> None:
        pass

    monkeypatch.setattr(generate_module, "_pause", none)


async def run(denoiser: Stage, vae: Stage) -> None:
    stages: Any = (Stage(*["conditioning"] * 5), denoiser, vae)
    with tracing.begun("job", {}), tracing.span("make"):
        await generate(Stages(*stages), REQUEST)


def media() -> Media:
    return Media((MediaFile(b"picture"),))


async def test_a_denoiser_that_dies_is_a_failed_call_and_the_next_is_one_more(traces: Traces) -> None:
    dying = [DenoisingBegun(), DenoisingProgress(4, 5), *CHECKPOINT, RayActorError()]
    denoiser = Stage(dying, [DenoisingBegun(), *DONE])
    await run(denoiser, Stage(media()))
    died, again = calls = traces.named("denoise")
    assert [attributes_of(call)["attempt"] for call in calls] == [1, 2]
    assert [attributes_of(call)["first_step"] for call in calls] == [0, 3]
    assert attributes_of(died)["error.type"] == "RayActorError"
    assert attributes_of(died)["last_step"] == 4
    assert events_of(died) == ["begun", "checkpoint held"]
    assert again.status.is_unset
    make = traces.one("make")
    assert {parent_of(call) for call in calls} == {id_of(make)}
    assert events_of(make) == ["replica lost"]
    carried = [envelope.trace["traceparent"].split("-")[1:3] for envelope in denoiser.envelopes]
    assert carried == [[trace_of(call), f"{id_of(call):016x}"] for call in calls]


async def test_a_longer_way_is_told(traces: Traces) -> None:
    await run(Stage(DONE, DONE), Stage(HandOffError("it lacks a call"), media()))
    assert [attributes_of(span)["attempt"] for span in traces.named("decode")] == [1, 2]
    assert events_of(traces.one("make")) == ["begun again"]


async def test_a_replica_that_refuses_is_told(traces: Traces) -> None:
    await run(Stage([ReplicaRefusedError("it tries another")], DONE), Stage(media()))
    assert events_of(traces.one("make")) == ["refused by a replica"]


async def test_without_a_trace_the_envelope_has_none() -> None:
    denoiser = Stage(DONE)
    await run(denoiser, Stage(media()))
    assert [envelope.trace for envelope in denoiser.envelopes] == [{}]
