"""The path of one request when a replica dies between two items of the denoiser's stream."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
)
from ray.serve.exceptions import RayServeException

from deployments.errors import (
    CannotResumeError,
    GenerationFailedError,
    HandOffError,
    HandOffIncompleteError,
    InvalidRequestError,
    ReplicaRefusedError,
    ReplicaUnfitError,
    StageUnavailableError,
)
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingProgress,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    PayloadFollows,
)
from serve_app.making import generate as generate_module
from serve_app.making.follower import Follower
from serve_app.making.generate import MAX_FAILURES, generate
from serve_app.making.stages import Stages
from serve_app.making.suspects import MAX_DEATHS_ALONE
from tests.support.played_stages import Reference, Stream
from tests.support.recorded_meter import RecordedMeter

REQUEST = GenerationRequest("request", "model", {}, 0, OutputFormat("image", "png"))
CHECKPOINT = PayloadFollows("checkpoint", 1)
INPUTS = PayloadFollows("decode_inputs", 2)
DECODE_INPUTS = DecodeInputs("result", Packed(None))
DEATH = RayActorError()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """None is made; how often in a row each would have been."""
    asked: list[int] = []

    async def note(times: int) -> None:
        asked.append(times)
        await asyncio.sleep(0)

    monkeypatch.setattr(generate_module, "_pause", note)
    return asked


class Stage:
    """A handle of any stage: its calls answer with what was prepared, one after another."""

    deployment_name = "Stage"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    def options(self, **_: Any) -> "Stage":
        return self

    encode = denoise = decode = property(lambda self: self)

    def remote(self, *arguments: Any) -> Any:
        for argument in arguments:  # Ray does not make a call one of whose arguments is an error
            if isinstance(argument, Reference) and isinstance(argument.value, Exception):
                failure = Reference(RayTaskError("call", "an argument could not be computed", argument.value))
                return stream([failure.value]) if isinstance(self.answers[0], list) else failure
        self.calls.append(arguments)
        answer = self.answers.pop(0)
        return stream(answer) if isinstance(answer, list) else Reference(answer)


def stream(items: list[Any]) -> Stream:
    async def each() -> AsyncIterator[Any]:
        for item in items:
            yield item

    return Stream(each())


def run(denoiser: Stage, vae: Stage) -> Media:
    encoder: Any = Stage(*["conditioning"] * 9)
    stages = Stages(encoder, denoiser, vae)  # type: ignore[arg-type]
    return asyncio.run(generate(stages, REQUEST))


def media() -> Media:
    return Media((MediaFile(b"picture"),))


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint("request", step, "fingerprint", "digest", Packed(None))


def checkpoints_sent(denoiser: Stage) -> list[Any]:
    return [call[3] for call in denoiser.calls]


COMPLETE = [CHECKPOINT, checkpoint(1), INPUTS, DECODE_INPUTS]
DYING = {
    "before anything": ([DEATH], None),
    "before a checkpoint is announced": ([DenoisingProgress(1, 2), DEATH], None),
    "between an announcement and its checkpoint": ([CHECKPOINT, DEATH], None),
    "after a checkpoint": ([CHECKPOINT, checkpoint(1), DEATH], checkpoint(1)),
    "between the announcement and a later checkpoint": (
        [CHECKPOINT, checkpoint(1), PayloadFollows("checkpoint", 2), DEATH],
        checkpoint(1),
    ),
    "before the inputs of the VAE": ([CHECKPOINT, checkpoint(1), INPUTS, DEATH], checkpoint(1)),
}


@pytest.mark.parametrize("moment", DYING)
def test_a_request_goes_on_from_the_last_checkpoint_that_arrived(moment: str) -> None:
    items, known = DYING[moment]
    denoiser, vae = Stage(items, COMPLETE), Stage(media())
    assert run(denoiser, vae).files == media().files
    assert checkpoints_sent(denoiser) == [None, known]
    [(_, inputs, _)] = vae.calls
    assert inputs.value == DECODE_INPUTS


def test_the_metrics_say_what_a_death_cost() -> None:
    meter, encoder = RecordedMeter(), Stage("conditioning", "conditioning")
    items = [CHECKPOINT, checkpoint(1), DenoisingProgress(2, 4), DenoisingProgress(3, 4), DEATH]
    stages = Stages(encoder, Stage(items, COMPLETE), Stage(media()), meter=meter)  # type: ignore[arg-type]
    asyncio.run(generate(stages, REQUEST))
    counted = {name: sum(values.values()) for name, values in meter.counted.items()}
    assert counted == {
        "triptych_attempts_total": 2,
        "triptych_recoveries_total": 1,
        "triptych_lost_steps_total": 2,
        "triptych_made_total": 1,
    }


def test_a_replica_that_dies_after_the_inputs_of_the_vae_costs_nothing() -> None:
    denoiser, vae = Stage([INPUTS, DECODE_INPUTS, DEATH]), Stage(media())
    assert run(denoiser, vae).files == media().files
    assert len(denoiser.calls) == 1


def test_encoding_is_done_again_when_its_replica_dies_before_the_denoiser_has_what_it_made() -> None:
    encoder: Any = Stage(DEATH, "conditioning")
    stages = Stages(encoder, Stage(COMPLETE), Stage(media()))  # type: ignore[arg-type]
    assert asyncio.run(generate(stages, REQUEST)).files == media().files
    assert len(encoder.calls) == 2


def test_encoding_is_done_again_when_the_router_finds_its_replica_dead_before_it_calls_the_denoiser() -> None:
    refused = RayServeException("an upstream actor died")
    refused.__cause__ = DEATH
    encoder: Any = Stage("conditioning", "conditioning")
    denoiser = Stage([refused], COMPLETE)
    stages = Stages(encoder, denoiser, Stage(media()))  # type: ignore[arg-type]
    assert asyncio.run(generate(stages, REQUEST)).files == media().files
    assert (len(encoder.calls), len(denoiser.calls)) == (2, 2)


def test_what_the_router_refuses_for_another_reason_is_not_tried_again() -> None:
    denoiser = Stage([RayServeException("no such deployment")])
    with pytest.raises(RayServeException, match="no such"):
        run(denoiser, Stage())


def test_decoding_is_done_again_without_denoising_again() -> None:
    denoiser, vae = Stage(COMPLETE), Stage(DEATH, media())
    assert run(denoiser, vae).files == media().files
    assert (len(denoiser.calls), len(vae.calls)) == (1, 2)


def test_a_request_that_kills_its_replicas_is_given_up(pauses: list[int]) -> None:
    denoiser = Stage(*[[DEATH]] * 9)
    with pytest.raises(GenerationFailedError, match=f"died {MAX_DEATHS_ALONE} times while it was tried alone"):
        run(denoiser, Stage())
    assert len(denoiser.calls) == 1 + MAX_DEATHS_ALONE
    assert [call[1].tried_until for call in denoiser.calls] == [None, 1, 1, 1]
    assert pauses == [1, 2, 3]


@pytest.mark.parametrize("stage", ["encoder", "vae"])
def test_poison_of_any_stage_is_given_up(stage: str) -> None:
    deadly = Stage(*[DEATH] * 9)
    encoder: Any = deadly if stage == "encoder" else Stage(*["conditioning"] * 9)
    vae: Any = deadly if stage == "vae" else Stage(media())
    with pytest.raises(GenerationFailedError, match="tried alone"):
        asyncio.run(generate(Stages(encoder, Stage(COMPLETE), vae), REQUEST))  # type: ignore[arg-type]
    assert len(deadly.calls) == 1 + MAX_DEATHS_ALONE


def test_a_request_that_gets_further_each_time_is_not_given_up() -> None:
    dying = [[PayloadFollows("checkpoint", step), checkpoint(step), DEATH] for step in range(1, 9)]
    denoiser = Stage(*dying, COMPLETE)
    assert run(denoiser, Stage(media())).files == media().files


def test_the_encoder_is_told_once_how_many_requests_there_was_no_room_for() -> None:
    encoder, denoiser, vae = Stage("conditioning", "conditioning"), Stage([DEATH], COMPLETE), Stage(media())
    refused = [3, 0]
    stages = Stages(encoder, denoiser, vae, take_refused=lambda: refused.pop(0))  # type: ignore[arg-type]
    asyncio.run(generate(stages, REQUEST))
    assert [envelope.refused_before for (_, envelope) in encoder.calls] == [3, 0]


def test_a_stream_that_ends_without_an_error_and_without_inputs_is_a_failure() -> None:
    with pytest.raises(GenerationFailedError, match="ended without"):
        run(Stage([CHECKPOINT, checkpoint(1)]), Stage())


def test_the_preview_of_a_video_is_asked_for_as_a_picture() -> None:
    shown: list[int] = []
    items = [PayloadFollows("preview", 1), DECODE_INPUTS, DenoisingProgress(1, 2), INPUTS, DECODE_INPUTS]
    vae: Any = Stage(media(), media())
    stages = Stages(Stage("conditioning"), Stage(items), vae)  # type: ignore[arg-type]
    request = dataclasses.replace(REQUEST, output=OutputFormat("video", "mp4"))

    class Looks(Follower):
        previews = 1

        def on_preview(self, step: int, media: Media) -> None:
            shown.append(step)

    async def run_it() -> None:
        await generate(stages, request, Looks())
        await asyncio.sleep(0.01)

    asyncio.run(run_it())
    asked = [(call[0].output.kind, call[0].output.format) for call in vae.calls]
    assert sorted(asked) == [("image", "jpeg"), ("video", "mp4")]
    assert shown == [1]


def test_inputs_that_are_lost_with_their_node_are_sent_from_here_and_nothing_is_denoised_again() -> None:
    lost = ObjectLostError("id", None, "call")  # type: ignore[no-untyped-call]
    denoiser, vae = Stage(COMPLETE), Stage(lost, media())
    assert run(denoiser, vae).files == media().files
    assert len(denoiser.calls) == 1
    assert [type(inputs) for _, inputs, _ in vae.calls] == [Reference, DecodeInputs]


def test_a_checkpoint_outlives_the_node_of_the_denoiser_that_made_it() -> None:
    lost = ObjectLostError("id", None, "call")  # type: ignore[no-untyped-call]
    denoiser = Stage([CHECKPOINT, checkpoint(1), PayloadFollows("checkpoint", 2), lost], COMPLETE)
    assert run(denoiser, Stage(media())).files == media().files
    assert checkpoints_sent(denoiser) == [None, checkpoint(1)]


class ResumesFrom(Follower):
    def __init__(self, step: int) -> None:
        self.resume_from = checkpoint(step)


def test_a_checkpoint_that_does_not_fit_means_start_again() -> None:
    refused = RayTaskError("denoise", "traceback", CannotResumeError("made by another model"))
    denoiser = Stage([refused.as_instanceof_cause()], COMPLETE)  # type: ignore[no-untyped-call]
    stages = Stages(Stage("conditioning", "conditioning"), denoiser, Stage(media()))  # type: ignore[arg-type]
    assert asyncio.run(generate(stages, REQUEST, ResumesFrom(5))).files == media().files
    assert checkpoints_sent(denoiser) == [checkpoint(5), None]


def test_a_request_that_is_refused_without_a_checkpoint_is_refused_once() -> None:
    denoiser = Stage([InvalidRequestError("no such size", "size")])
    with pytest.raises(InvalidRequestError, match="no such size"):
        run(denoiser, Stage())
    assert len(denoiser.calls) == 1


@pytest.mark.parametrize("end", ["the caller hangs up", "something else comes than was announced"])
def test_the_denoiser_is_told_when_nobody_reads_on(end: str) -> None:
    async def stuck() -> AsyncIterator[Any]:
        yield DenoisingProgress(1, 2)
        if end == "the caller hangs up":
            await asyncio.Event().wait()
        yield CHECKPOINT
        yield DECODE_INPUTS

    class Denoiser(Stage):
        def remote(self, *arguments: Any) -> Any:
            return call

        denoise = property(lambda self: self)

    async def run_it() -> None:
        stages = Stages(Stage("conditioning"), Denoiser(), Stage())  # type: ignore[arg-type]
        task = asyncio.create_task(generate(stages, REQUEST))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    call = Stream(stuck())
    asyncio.run(run_it())
    assert call.is_cancelled


DEAD = [
    ActorUnavailableError("the node is gone", None),
    NodeDiedError("the node is gone"),
    OutOfMemoryError("the node is short of memory"),
    OwnerDiedError("id", None, "call"),  # type: ignore[no-untyped-call]
    ObjectLostError("id", None, "call"),  # type: ignore[no-untyped-call]
    ReplicaUnfitError("its device is gone"),
]


@pytest.mark.parametrize("error", DEAD, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["encoder", "denoiser", "vae"])
def test_every_kind_of_loss_in_every_stage_is_got_over_and_no_error_is_passed_on(error: Exception, stage: str) -> None:
    wrapped: Any = RayTaskError("call", "traceback", error).as_instanceof_cause()  # type: ignore[no-untyped-call]
    encoder: Any = Stage(*([wrapped] if stage == "encoder" else []), "conditioning", "conditioning")
    denoiser = Stage(*([[CHECKPOINT, checkpoint(1), wrapped]] if stage == "denoiser" else []), COMPLETE)
    vae = Stage(*([wrapped] if stage == "vae" else []), media())
    made = asyncio.run(generate(Stages(encoder, denoiser, vae), REQUEST))  # type: ignore[arg-type]
    assert made.files == media().files
    handed_on = [argument for call in (*denoiser.calls, *vae.calls) for argument in call]
    assert not [each for each in handed_on if isinstance(getattr(each, "value", each), BaseException)]


@pytest.mark.parametrize(
    "lost",
    [ObjectLostError("id", None, "call"), ActorUnavailableError("not now", None)],  # type: ignore[no-untyped-call]
    ids=lambda error: type(error).__name__,
)
def test_what_is_lost_again_and_again_may_be_tried_later_after_pauses_that_grow(
    lost: Exception, pauses: list[int]
) -> None:
    encoder: Any = Stage(*[lost] * (MAX_FAILURES + 9))
    with pytest.raises(StageUnavailableError, match=f"lost {MAX_FAILURES} times"):
        asyncio.run(generate(Stages(encoder, Stage(), Stage()), REQUEST))  # type: ignore[arg-type]
    assert pauses == list(range(1, MAX_FAILURES))


async def test_pauses_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(generate_module.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(generate_module.asyncio, "sleep", note)
    for times in (1, 2, 3, 7, 999):
        await generate_module._pause(times)
    assert waited == [0.1, 0.2, 0.4, 5.0, 5.0]


def test_a_replica_that_will_not_begin_is_no_death(pauses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ReplicaRefusedError("it tries another")
    encoder, denoiser = Stage("conditioning"), Stage(*[[refused]] * 7, COMPLETE)
    stages = Stages(encoder, denoiser, Stage(refused, media()))  # type: ignore[arg-type]
    assert asyncio.run(generate(stages, REQUEST)).files == media().files
    assert {call[1].tried_until for call in denoiser.calls} == {None}
    assert pauses == list(range(1, 9))
    assert len(encoder.calls) == 1, "what was encoded is kept meanwhile"
    monkeypatch.setattr(generate_module, "MAX_REFUSALS", 4)
    with pytest.raises(StageUnavailableError, match="no replica"):
        run(Stage(*[[refused]] * 9), Stage())


# --- the complete hand-off ---

INCOMPLETE = HandOffIncompleteError("more is needed")


def complete_hand_offs(stage: Stage) -> list[bool]:
    return [call[1].complete_hand_off for call in stage.calls]


def with_remote_calls(stage: Stage) -> list[bool]:
    return [call[1].remote_calls for call in stage.calls]


def ask(stages: Stages, *requests: GenerationRequest) -> None:
    async def all_of_them() -> None:
        for request in requests:
            await generate(stages, request)

    asyncio.run(all_of_them())


def test_what_needs_the_complete_hand_off_is_learned_for_its_kind_of_request() -> None:
    denoiser, vae = Stage(*[COMPLETE] * 9), Stage(INCOMPLETE, *[media()] * 8)
    stages = Stages(Stage(*["conditioning"] * 9), denoiser, vae)  # type: ignore[arg-type]
    other = dataclasses.replace(REQUEST, arguments={"image": 1})
    ask(stages, REQUEST, REQUEST, other)
    assert complete_hand_offs(denoiser) == [False, True, True, False]


def test_a_request_that_fails_on_every_way_changes_nothing_for_others() -> None:
    denoiser, vae = Stage(*[COMPLETE] * 9), Stage(INCOMPLETE, INCOMPLETE, INCOMPLETE, media())
    stages = Stages(Stage(*["conditioning"] * 9), denoiser, vae)  # type: ignore[arg-type]
    with pytest.raises(HandOffIncompleteError):
        ask(stages, REQUEST)
    ask(stages, REQUEST)
    assert complete_hand_offs(denoiser) == [False, True, False, False]
    assert with_remote_calls(denoiser) == [False, False, True, False]


def test_what_no_hand_off_serves_is_made_with_remote_calls_and_that_is_learned_for_its_kind() -> None:
    denoiser, vae = Stage(*[COMPLETE] * 9), Stage(HandOffError("it samples from them"), *[media()] * 8)
    stages = Stages(Stage(*["conditioning"] * 9), denoiser, vae)  # type: ignore[arg-type]
    other = dataclasses.replace(REQUEST, arguments={"image": 1})
    ask(stages, REQUEST, REQUEST, other)
    assert with_remote_calls(denoiser) == [False, True, True, False]
    assert complete_hand_offs(denoiser) == [False] * 4


def test_a_resumed_request_whose_hand_off_lacks_something_starts_again_before_it_is_thought_to_need_more() -> None:
    denoiser, vae = Stage(*[COMPLETE] * 9), Stage(INCOMPLETE, media())
    stages = Stages(Stage(*["conditioning"] * 9), denoiser, vae)  # type: ignore[arg-type]
    asyncio.run(generate(stages, REQUEST, ResumesFrom(5)))
    assert checkpoints_sent(denoiser) == [checkpoint(5), None]
    assert complete_hand_offs(denoiser) == [False, False]
