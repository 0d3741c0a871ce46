"""The path of one request through the three stages.

Tensors go from replica to replica: the ingress passes references on and never reads what they hold.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import GenerationFailedError, HandOffIncompleteError
from deployments.messages import (
    Checkpoint,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Media,
    OutputFormat,
    PayloadFollows,
)
from serve_app.making.metrics import generation_metrics

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # a request whose replicas die this often without getting further is given up as poison
LOST = (RayActorError, ObjectLostError)  # a replica died, or with its node what it had made

OnProgress = Callable[[DenoisingProgress], None]
OnCheckpoint = Callable[[ray.ObjectRef[Any], int], None]  # a reference to a Checkpoint, and its step
OnPreview = Callable[[int, Media], None]  # the step, and what would come out if it were the last


@dataclass
class Stages:
    """The handles of the three stages; with fewer deployments than stages, some are the same."""

    encoder: DeploymentHandle
    denoiser: DeploymentHandle
    vae: DeploymentHandle
    owner: str = ""  # the Ray actor of this process, without which the denoiser does not go on
    take_refused: Callable[[], int] = lambda: 0  # requests refused since the last call, told with the next
    complete_hand_off: bool = field(default=False, init=False)  # learned: see HandOffIncompleteError

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles by the name of their deployment, each once."""
        return {handle.deployment_name: handle for handle in (self.encoder, self.denoiser, self.vae)}


@dataclass
class Denoising:
    """How far a request's denoising is, in references to what the replicas made."""

    checkpoint: ray.ObjectRef[Any] | None = None
    step: int = 0  # of the checkpoint
    last_step: int = 0  # the last that was seen
    decode_inputs: ray.ObjectRef[Any] | None = None
    resumes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    on_checkpoint: OnCheckpoint | None = None
    shown: set[int] = field(default_factory=set)  # steps of previews: a step that is made again is not shown again

    def keep_checkpoint(self, checkpoint: ray.ObjectRef[Any], step: int) -> None:
        self.checkpoint, self.step = checkpoint, step
        if self.on_checkpoint is not None:
            self.on_checkpoint(checkpoint, step)

    @property
    def furthest(self) -> tuple[int, int]:
        """How far it got, for comparison: (stages behind it, steps seen)."""
        return (1, 0) if self.decode_inputs is not None else (0, max(self.step, self.last_step))

    async def check_decode_inputs(self) -> None:
        """Raises what the denoiser died of where that error stands in place of the inputs of the VAE stage.

        Asked only when decoding has failed: no request waits for the answer, and no bytes are read here.
        """
        try:
            await self.decode_inputs  # type: ignore[misc]
        except RayError:
            self.decode_inputs = None
            raise

    def forget_lost_steps(self) -> int:
        """How many steps must be done again; none once the denoising is over."""
        lost = 0 if self.decode_inputs is not None else max(0, self.last_step - self.step)
        self.last_step = self.step
        return lost


async def generate(
    stages: Stages,
    request: GenerationRequest,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    resume_from: Checkpoint | None = None,
    on_preview: OnPreview | None = None,
) -> Media:
    """The files that the request makes.

    The work of a replica that dies is done again by another: encoding and decoding from the start, denoising
    from its last checkpoint. Raises InvalidRequestError for the caller's faults, GenerationFailedError for a
    request whose replicas died MAX_DEATHS times without getting further.
    """
    denoising = Denoising(on_checkpoint=on_checkpoint)
    if resume_from is not None:
        denoising.checkpoint = ray.put(resume_from)
        denoising.step = denoising.last_step = resume_from.step
    deaths, furthest_at_last_death = 0, (-1, 0)
    metrics = generation_metrics()
    while True:
        envelope = Envelope(
            owner=stages.owner,
            report_progress=on_progress is not None,
            complete_hand_off=stages.complete_hand_off,
            refused_before=stages.take_refused(),
        )
        metrics.attempts.inc()
        try:
            return await run_stages(stages, request, envelope, denoising, on_progress, on_preview)
        except HandOffIncompleteError as error:
            if envelope.complete_hand_off:
                raise
            logger.warning("every decoder call will be handed over from now on: %s", first_line(error))
            stages.complete_hand_off = True
            denoising = Denoising(on_checkpoint=on_checkpoint)
        except (RayError, RayServeException) as error:
            death = lost(error)
            if death is None:
                raise
            deaths = deaths + 1 if denoising.furthest <= furthest_at_last_death else 1
            furthest_at_last_death = max(furthest_at_last_death, denoising.furthest)
            denoising.resumes += 1
            if isinstance(death, ObjectLostError):
                denoising = Denoising(
                    resumes=denoising.resumes, last_step=denoising.last_step, on_checkpoint=on_checkpoint
                )
            lost_steps = denoising.forget_lost_steps()
            metrics.recoveries.inc()
            if lost_steps:
                metrics.lost_steps.inc(lost_steps)
            logger.warning(
                "request %s: a replica died (%d in a row without progress), going on from step %d (%d steps lost): %s",
                request.request_id, deaths, denoising.step, lost_steps, first_line(death),
            )  # fmt: skip
            if deaths >= MAX_DEATHS:
                metrics.given_up.inc()
                raise GenerationFailedError(f"the replicas working on it died {deaths} times in a row") from error


async def run_stages(
    stages: Stages,
    request: GenerationRequest,
    envelope: Envelope,
    denoising: Denoising,
    on_progress: OnProgress | None,
    on_preview: OnPreview | None,
) -> Media:
    """Encoder, denoiser, VAE; what `denoising` already holds is not done again."""
    if denoising.decode_inputs is None:
        conditioning = stages.encoder.encode.remote(request, envelope)  # not awaited: the denoiser gets it by reference
        previews = Previews(stages, request, on_preview, denoising.shown)
        try:
            denoising.decode_inputs = await denoise(
                stages, request, envelope, conditioning, denoising, on_progress, previews
            )
        finally:
            previews.stop()
    try:
        media: Media = await stages.vae.decode.remote(request, denoising.decode_inputs)
    except Exception:
        await denoising.check_decode_inputs()
        raise
    return dataclasses.replace(media, seconds=denoising.seconds | media.seconds)


async def denoise(
    stages: Stages,
    request: GenerationRequest,
    envelope: Envelope,
    conditioning: Any,
    denoising: Denoising,
    on_progress: OnProgress | None,
    previews: Previews,
) -> ray.ObjectRef[Any]:
    """Follows the denoiser's stream and keeps its last checkpoint; returns the inputs of the VAE stage.

    Both are references: the items of the stream belong to this process, so they outlive the replica that made
    them, and their bytes are never read here.
    """
    stream = stages.denoiser.options(stream=True).denoise.remote(request, envelope, conditioning, denoising.checkpoint)
    announced: PayloadFollows | None = None
    unread: ray.ObjectRef[Any] | None = None  # a payload, or the error of a replica that died: they look alike
    try:
        async for reference in await stream._to_object_ref_gen():
            if announced is not None and announced.kind == "decode_inputs":
                denoising.seconds = announced.seconds
                return reference
            if announced is not None and unread is None:
                unread = reference
                continue
            if announced is not None and unread is not None:  # something followed it: it is no error
                if announced.kind == "checkpoint":
                    denoising.keep_checkpoint(unread, announced.step)
                else:
                    previews.show(announced.step, unread)
                announced = unread = None
            item = await reference
            if isinstance(item, PayloadFollows):
                announced = item
            else:
                denoising.last_step = item.step
                if on_progress is not None:
                    on_progress(item)
        if unread is not None:
            await unread  # raises what the replica died of
    except asyncio.CancelledError:
        stream.cancel()
        raise
    raise GenerationFailedError("the denoiser's stream ended without the inputs of the VAE stage")


def lost(error: BaseException) -> BaseException | None:
    """The death of a replica or of what it made, also where it made an argument of the call that failed.

    Such a failure is a RayTaskError when the call was made, and a RayServeException of the router when it was not.
    """
    while (cause := cause_of(error)) is not None:
        error = cause
    return error if isinstance(error, LOST) else None


def cause_of(error: BaseException) -> BaseException | None:
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return error.cause
    return error.__cause__ if isinstance(error, RayServeException) else None


class Previews:
    """Decodes what the denoiser shows on its way; it never delays the picture itself, nor fails it."""

    def __init__(
        self, stages: Stages, request: GenerationRequest, on_preview: OnPreview | None, shown: set[int]
    ) -> None:
        self.stages = stages
        self.request = request
        self.on_preview = on_preview
        self.shown = shown
        self.tasks: set[asyncio.Task[None]] = set()

    def show(self, step: int, inputs: ray.ObjectRef[Any]) -> None:
        if self.on_preview is not None and step not in self.shown:
            self.shown.add(step)
            task = asyncio.ensure_future(self._show(step, inputs, self.on_preview))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _show(self, step: int, inputs: ray.ObjectRef[Any], on_preview: OnPreview) -> None:
        try:
            request = self.request
            if request.output.kind == "video":  # its first frame
                request = dataclasses.replace(request, output=OutputFormat("image", "jpeg"))
            on_preview(step, await self.stages.vae.decode.remote(request, inputs))
        except Exception as error:  # noqa: BLE001  (the picture itself comes, or says what is wrong)
            logger.warning("request %s: no preview of step %d: %s", self.request.request_id, step, first_line(error))

    def stop(self) -> None:
        """What is not decoded yet comes too late."""
        for task in self.tasks:
            task.cancel()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
