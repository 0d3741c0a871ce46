"""The path of one request through the three stages.

Tensors go from replica to replica: the ingress passes references on. Each is read here first, so that none that holds
an error or nothing is passed: Serve's router would take that for a failure of the replica called, and call again and
again. What a request could not go on without, its last checkpoint and the inputs of the VAE stage, is held as bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError
from ray.serve.exceptions import RayServeException

from deployments import tracing
from deployments.errors import (
    CannotResumeError,
    DeviceFullError,
    GenerationFailedError,
    HandOffError,
    HandOffIncompleteError,
    OtherVersionError,
    ReplicaRefusedError,
    ReplicaUnfitError,
    StageUnavailableError,
)
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingBegun,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Media,
    RequestWarning,
)
from deployments.metrics.meter import NO_METER, Meter
from deployments.tracing import Span
from serve_app.making.denoiser_stream import CheckpointArrived, DecodeInputsArrived, DenoiserStream, PreviewArrived
from serve_app.making.follower import NOBODY, Follower
from serve_app.making.previews import Previews
from serve_app.making.ray_errors import first_line, lost
from serve_app.making.stages import HandOffWay, Stages
from serve_app.making.suspects import Place, Suspicion

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before the next try; twice as long after each without progress
FIRST_PAUSE_FULL_S, LONGEST_PAUSE_FULL_S = 1.0, 30.0  # where the device is full; others' work takes its time
MAX_FAILURES = 20  # deaths and losses in a row without getting further, whoever is to blame: more than a minute
HAND_OFFS = {"complete": "the complete hand-off", "remote": "remote calls"}
MAX_REFUSALS = 1000  # of replicas that would not begin with it: some 80 minutes


@dataclass
class Reached:
    """How far a request has come, whatever replicas die: what it goes on from."""

    checkpoint: Checkpoint | None = None
    last_step: int = 0  # the last that was seen
    conditioning: Any = None  # a reference to what the encoder made on this way; its bytes were here
    decode_inputs: DecodeInputs | None = None
    decode_inputs_reference: Any = None  # None where a call with it failed: then the bytes are sent
    seconds: dict[str, float] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)  # steps of previews: a step that is made again is not shown again
    has_resumed: bool = False  # what it has reached is founded on a checkpoint
    calls: Counter[str] = field(default_factory=Counter)  # of each stage, so far

    @property
    def step(self) -> int:
        """That of the checkpoint; 0 without one."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def place(self) -> Place:
        if self.decode_inputs is not None:
            return 2, 0
        return (0, 0) if self.conditioning is None else (1, max(self.step, self.last_step))

    def forget_lost_steps(self) -> int:
        """How many steps must be done again; none once the denoising is over."""
        num_lost = 0 if self.decode_inputs is not None else max(0, self.last_step - self.step)
        self.last_step = self.step
        return num_lost

    def forget_references(self) -> None:
        """They may lead to what was lost."""
        self.conditioning = self.decode_inputs_reference = None

    def from_the_start(self) -> Reached:
        return Reached(shown=self.shown, calls=self.calls)


@dataclass
class Way:
    """One request on its way: what it has reached, what is thought of it, how often in a row it got no further."""

    suspicion: Suspicion
    reached: Reached
    hand_off: HandOffWay
    meter: Meter = NO_METER
    failures: int = 0
    refusals: int = 0
    furthest_at_failure: Place = (-1, 0)
    waited_s: float = 0.0  # for the memory of a device, since it got further
    next_wait_s: float = FIRST_PAUSE_FULL_S
    furthest_at_wait: Place = (-1, 0)

    def note_reached(self) -> None:
        self.suspicion.reached(self.reached.place)

    def note_failure(self) -> None:
        place = self.reached.place
        self.failures = self.failures + 1 if place <= self.furthest_at_failure else 1
        self.furthest_at_failure = max(place, self.furthest_at_failure)

    def wait_s(self, patience_s: float) -> float | None:
        """Seconds until it is tried again whether the device has memory; None where the patience is over."""
        place = self.reached.place
        if place > self.furthest_at_wait:
            self.furthest_at_wait, self.waited_s, self.next_wait_s = place, 0.0, FIRST_PAUSE_FULL_S
        if self.waited_s + self.next_wait_s > patience_s:
            return None
        wait_s, self.next_wait_s = self.next_wait_s, min(LONGEST_PAUSE_FULL_S, 2 * self.next_wait_s)
        self.waited_s += wait_s
        return wait_s


async def generate(stages: Stages, request: GenerationRequest, follower: Follower = NOBODY) -> Media:
    """The files that the request makes.

    The work of a replica that dies is done again by another: encoding and decoding from the start, denoising
    from its last checkpoint. A checkpoint that is of no use means start again. Raises InvalidRequestError for the
    caller's faults, GenerationFailedError for a request whose replica died MAX_DEATHS_ALONE times when it was tried
    alone (serve_app.making.suspects), StageUnavailableError when no replica would begin with it, or when
    replicas cannot be reached or what they made is lost, MAX_FAILURES times in a row, DeviceFullError where a device
    was full for longer than the follower waits.
    """
    reached = Reached(follower.resume_from, last_step=follower.resume_from.step if follower.resume_from else 0)
    way = Way(stages.suspects.new_request(), reached, stages.hand_off_of(request), stages.meter)
    try:
        while True:
            await way.suspicion.wait_for_turn()
            way.meter.count("triptych_attempts_total")
            try:
                media = await run_stages(stages, request, way, follower)
            except (CannotResumeError, HandOffError) as error:
                _begin_again(request, way, error)
            except ReplicaRefusedError as error:
                await _wait_after_refusal(way, error)
            except OtherVersionError as error:
                await _leave_version(request, way, error)
            except DeviceFullError as error:
                await _wait_for_memory(request, way, follower, error)
            except (RayError, RayServeException, ReplicaUnfitError) as error:
                death = lost(error)
                if death is None:
                    raise
                await _recover(request, way, death)
            else:
                stages.note_hand_off(request, way.hand_off)
                way.meter.count("triptych_made_total", model=request.model, kind=request.output.kind)
                return media
    finally:
        way.suspicion.end_turn()


def _begin_again(request: GenerationRequest, way: Way, error: Exception) -> None:
    """Without the checkpoint where there was one, else on a longer way; raises what none of these can help."""
    if way.reached.has_resumed:
        logger.warning("request %s starts again, its checkpoint is of no use: %s", request.request_id, error)
        way.meter.count("triptych_begun_again_total", start="checkpoint")
    elif isinstance(error, CannotResumeError) or way.hand_off == "remote":
        raise error
    else:
        lacks_calls = isinstance(error, HandOffIncompleteError) and way.hand_off == "first"
        way.hand_off = "complete" if lacks_calls else "remote"
        logger.warning(
            "request %s starts again with %s: %s", request.request_id, HAND_OFFS[way.hand_off], first_line(error)
        )
        way.meter.count("triptych_begun_again_total", start=way.hand_off)
    tracing.current().event("begun again", error=type(error).__name__, hand_off=way.hand_off)
    way.reached = way.reached.from_the_start()


async def _wait_after_refusal(way: Way, error: Exception) -> None:
    way.refusals += 1
    tracing.current().event("refused by a replica")
    way.meter.count("triptych_replica_refusals_total")
    if way.refusals >= MAX_REFUSALS:
        raise StageUnavailableError("no replica of a stage would begin with the request") from error
    await _pause(way.refusals)


async def _leave_version(request: GenerationRequest, way: Way, error: Exception) -> None:
    """During an update: without what the stages before have made. The checkpoint stays, whose fingerprint decides."""
    reached = way.reached
    if reached.decode_inputs is not None:
        way.reached = reached.from_the_start()
    else:
        reached.forget_references()
        _forget_lost_steps(way)
    logger.warning("request %s goes on from step %d: %s", request.request_id, way.reached.step, first_line(error))
    await _wait_after_refusal(way, error)


async def _wait_for_memory(request: GenerationRequest, way: Way, follower: Follower, error: Exception) -> None:
    """Goes on from the last checkpoint when others have left the device; raises the error for who does not wait."""
    wait_s = way.wait_s(follower.patience_s)
    if wait_s is None:
        raise error
    _forget_lost_steps(way)
    way.suspicion.end_turn()
    way.meter.count("triptych_memory_waits_total")
    follower.on_wait("device")
    tracing.current().event("waits for the device", waiting_s=wait_s)
    logger.warning("request %s is tried again in about %g s: %s", request.request_id, wait_s, first_line(error))
    await _rest(wait_s)


async def _recover(request: GenerationRequest, way: Way, death: BaseException) -> None:
    """Raises GenerationFailedError for poison, StageUnavailableError where too much is lost for another reason."""
    reached = way.reached
    way.note_failure()
    if not isinstance(death, ObjectLostError):
        way.suspicion.died(reached.place, is_certain=not isinstance(death, ActorUnavailableError))
    reached.forget_references()
    lost_steps = _forget_lost_steps(way)
    way.meter.count("triptych_recoveries_total")
    tracing.current().event("replica lost", error=type(death).__name__, first_step=reached.step, lost_steps=lost_steps)
    logger.warning(
        "request %s: a replica died (%d in a row without progress), going on from step %d (%d steps lost): %s",
        request.request_id, way.failures, reached.step, lost_steps, first_line(death),
    )  # fmt: skip
    if way.suspicion.is_poison:
        way.meter.count("triptych_given_up_total")
        raise GenerationFailedError(
            f"the replica that worked on it died {way.suspicion.deaths_alone} times while it was tried alone"
        ) from death
    if way.failures >= MAX_FAILURES:
        raise StageUnavailableError(f"replicas or what they made were lost {way.failures} times in a row") from death
    await _pause(way.failures)


def _forget_lost_steps(way: Way) -> int:
    lost_steps = way.reached.forget_lost_steps()
    way.meter.count("triptych_lost_steps_total", lost_steps)
    return lost_steps


async def _pause(times: int) -> None:
    await _rest(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(times - 1, 10)))


async def _rest(longest_s: float) -> None:
    """Not of equal length for all, so that those who failed together do not come back together."""
    await asyncio.sleep(random.uniform(0.5, 1) * longest_s)


async def run_stages(stages: Stages, request: GenerationRequest, way: Way, follower: Follower) -> Media:
    """Encoder, denoiser, VAE; what is reached already is not done again."""
    reached = way.reached
    if reached.decode_inputs is None:
        await encode_and_denoise(stages, request, way, follower)
    inputs = reached.decode_inputs_reference or reached.decode_inputs
    with call_of("decode", reached):
        media: Media = await stages.vae.decode.remote(request, inputs, envelope_of(stages, way, follower))
    warnings = (*request.warnings, *media.warnings)
    return dataclasses.replace(media, seconds=reached.seconds | media.seconds, warnings=warnings)


async def encode_and_denoise(stages: Stages, request: GenerationRequest, way: Way, follower: Follower) -> None:
    reached = way.reached
    if reached.conditioning is None:
        with call_of("encode", reached):
            envelope = dataclasses.replace(envelope_of(stages, way, follower), refused_before=stages.take_refused())
            conditioning = stages.encoder.encode.remote(request, envelope)
            await conditioning
        reached.conditioning = conditioning
        way.note_reached()
    reached.has_resumed = reached.checkpoint is not None
    previews = Previews(stages.vae, request, follower, reached.shown)
    with call_of("denoise", reached) as span:
        span.set(first_step=reached.step)
        call = stages.denoiser.options(stream=True).denoise.remote(
            request, envelope_of(stages, way, follower), reached.conditioning, reached.checkpoint
        )
        try:
            await denoise(DenoiserStream(call), way, follower, previews)
        finally:
            previews.stop()
            span.set(last_step=reached.last_step or None)


def call_of(stage: str, reached: Reached) -> Span:
    """The span of one call of a stage."""
    reached.calls[stage] += 1
    return tracing.span(stage, attempt=reached.calls[stage])


def envelope_of(stages: Stages, way: Way, follower: Follower) -> Envelope:
    return stages.envelope(follower, way.suspicion, way.hand_off)


async def denoise(stream: DenoiserStream, way: Way, follower: Follower, previews: Previews) -> None:
    """Reads the denoiser's stream to its end and keeps what it reaches."""
    reached, span = way.reached, tracing.current()
    try:
        async for event in stream.events():
            match event:
                case DenoisingBegun():
                    follower.on_begin()
                    span.event("begun")
                case DenoisingProgress(step=step):
                    reached.last_step = step
                    if follower.wants_progress:
                        follower.on_progress(event)
                case RequestWarning():
                    follower.on_warning(event)
                case CheckpointArrived(checkpoint):
                    reached.checkpoint = checkpoint
                    follower.on_checkpoint(checkpoint)
                    span.event("checkpoint held", step=checkpoint.step)
                case PreviewArrived(step, inputs):
                    previews.show(step, inputs)
                    span.event("preview", step=step)
                case DecodeInputsArrived(inputs, reference, seconds):
                    reached.decode_inputs, reached.decode_inputs_reference = inputs, reference
                    reached.seconds = seconds
                    reached.checkpoint = reached.conditioning = None  # nobody goes back behind the inputs
            way.note_reached()
    except BaseException:  # nobody reads on, so nobody may work on
        stream.cancel()
        raise
