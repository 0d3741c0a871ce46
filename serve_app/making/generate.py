"""The path of one request through the three stages.

Tensors go from replica to replica: the ingress passes references on. What a request could not go on without,
its last checkpoint and the inputs of the VAE stage, it also holds as bytes.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ObjectLostError, RayError
from ray.serve.exceptions import RayServeException

from deployments.errors import GenerationFailedError, HandOffIncompleteError, InvalidRequestError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Media,
    RequestWarning,
)
from serve_app.errors import original_error
from serve_app.making.denoiser_stream import CheckpointArrived, DecodeInputsArrived, DenoiserStream, PreviewArrived
from serve_app.making.follower import NOBODY, Follower
from serve_app.making.metrics import generation_metrics
from serve_app.making.previews import Previews
from serve_app.making.ray_errors import first_line, lost
from serve_app.making.stages import Stages

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # a request whose replicas die this often without getting further is given up as poison


@dataclass
class Reached:
    """How far a request has come, whatever replicas die: what it goes on from."""

    checkpoint: Checkpoint | None = None
    last_step: int = 0  # the last that was seen
    decode_inputs: DecodeInputs | None = None
    decode_inputs_reference: Any = None  # None where the object was lost: then the bytes are sent
    seconds: dict[str, float] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)  # steps of previews: a step that is made again is not shown again

    @property
    def step(self) -> int:
        """That of the checkpoint; 0 without one."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def furthest(self) -> tuple[int, int]:
        """How far it got, for comparison: (stages behind it, steps seen)."""
        return (1, 0) if self.decode_inputs is not None else (0, max(self.step, self.last_step))

    def forget_lost_steps(self) -> int:
        """How many steps must be done again; none once the denoising is over."""
        num_lost = 0 if self.decode_inputs is not None else max(0, self.last_step - self.step)
        self.last_step = self.step
        return num_lost


async def generate(stages: Stages, request: GenerationRequest, follower: Follower = NOBODY) -> Media:
    """The files that the request makes.

    The work of a replica that dies is done again by another: encoding and decoding from the start, denoising
    from its last checkpoint. A checkpoint that does not fit means start again. Raises InvalidRequestError for the
    caller's faults, GenerationFailedError for a request whose replicas died MAX_DEATHS times without getting further.
    """
    reached = Reached(follower.resume_from)
    reached.last_step = reached.step
    deaths, furthest_at_last_death = 0, (-1, 0)
    metrics = generation_metrics()
    while True:
        envelope = stages.envelope(follower)
        metrics.attempts.inc()
        try:
            return await run_stages(stages, request, envelope, reached, follower)
        except HandOffIncompleteError as error:
            if envelope.complete_hand_off:
                raise
            logger.warning("every decoder call will be handed over from now on: %s", first_line(error))
            stages.complete_hand_off = True
            reached = Reached(shown=reached.shown)
        except InvalidRequestError as error:
            if reached.checkpoint is None or getattr(original_error(error), "param", None) != "checkpoint":
                raise
            logger.warning("request %s starts again, its checkpoint does not fit: %s", request.request_id, error)
            reached = Reached(shown=reached.shown)
        except (RayError, RayServeException) as error:
            death = lost(error)
            if death is None:
                raise
            deaths = deaths + 1 if reached.furthest <= furthest_at_last_death else 1
            furthest_at_last_death = max(furthest_at_last_death, reached.furthest)
            if isinstance(death, ObjectLostError):
                reached.decode_inputs_reference = None
            lost_steps = reached.forget_lost_steps()
            metrics.recoveries.inc()
            if lost_steps:
                metrics.lost_steps.inc(lost_steps)
            logger.warning(
                "request %s: a replica died (%d in a row without progress), going on from step %d (%d steps lost): %s",
                request.request_id, deaths, reached.step, lost_steps, first_line(death),
            )  # fmt: skip
            if deaths >= MAX_DEATHS:
                metrics.given_up.inc()
                raise GenerationFailedError(f"the replicas working on it died {deaths} times in a row") from error


async def run_stages(
    stages: Stages, request: GenerationRequest, envelope: Envelope, reached: Reached, follower: Follower
) -> Media:
    """Encoder, denoiser, VAE; what is reached already is not done again."""
    if reached.decode_inputs is None:
        conditioning = stages.encoder.encode.remote(request, envelope)  # not awaited: the denoiser gets it by reference
        previews = Previews(stages.vae, request, follower, reached.shown)
        call = stages.denoiser.options(stream=True).denoise.remote(request, envelope, conditioning, reached.checkpoint)
        try:
            await denoise(DenoiserStream(call), reached, follower, previews)
        finally:
            previews.stop()
    inputs = reached.decode_inputs_reference or reached.decode_inputs
    media: Media = await stages.vae.decode.remote(request, inputs)
    warnings = (*request.warnings, *media.warnings)
    return dataclasses.replace(media, seconds=reached.seconds | media.seconds, warnings=warnings)


async def denoise(stream: DenoiserStream, reached: Reached, follower: Follower, previews: Previews) -> None:
    """Reads the denoiser's stream to its end and keeps what it reaches."""
    try:
        async for event in stream.events():
            match event:
                case DenoisingProgress(step=step):
                    reached.last_step = step
                    follower.on_progress(event)
                case RequestWarning():
                    follower.on_warning(event)
                case CheckpointArrived(checkpoint):
                    reached.checkpoint = checkpoint
                    follower.on_checkpoint(checkpoint)
                case PreviewArrived(step, inputs):
                    previews.show(step, inputs)
                case DecodeInputsArrived(inputs, reference, seconds):
                    reached.decode_inputs, reached.decode_inputs_reference = inputs, reference
                    reached.seconds = seconds
                    reached.checkpoint = None  # nobody goes back behind the inputs
    except BaseException:  # nobody reads on, so nobody may work on
        stream.cancel()
        raise
