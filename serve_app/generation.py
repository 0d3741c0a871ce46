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
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.errors import GenerationFailedError, HandOffIncompleteError
from deployments.messages import DenoisingProgress, GenerationRequest, Media, PayloadFollows

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4  # a request whose replicas die this often is given up

OnProgress = Callable[[DenoisingProgress], None]


@dataclass
class Stages:
    """The handles of the three stages; with fewer deployments than stages, some are the same."""

    encoder: DeploymentHandle
    denoiser: DeploymentHandle
    vae: DeploymentHandle
    complete_hand_off: bool = field(default=False, init=False)  # learned: see HandOffIncompleteError

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles by the name of their deployment, each once."""
        return {handle.deployment_name: handle for handle in (self.encoder, self.denoiser, self.vae)}


async def generate(stages: Stages, request: GenerationRequest, on_progress: OnProgress | None = None) -> Media:
    """The files that the request makes.

    A replica that dies has its work done again by another, up to MAX_ATTEMPTS times in all.
    Raises InvalidRequestError for the caller's faults, GenerationFailedError when the attempts are used up.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        request = dataclasses.replace(request, complete_hand_off=stages.complete_hand_off)
        try:
            return await run_stages(stages, request, on_progress)
        except HandOffIncompleteError as error:
            if request.complete_hand_off:
                raise
            logger.warning("every decoder call will be handed over from now on: %s", first_line(error))
            stages.complete_hand_off = True
        except RayActorError as error:
            logger.warning(
                "request %s: a replica died in attempt %d of %d: %s",
                request.request_id, attempt, MAX_ATTEMPTS, first_line(error),
            )  # fmt: skip
    raise GenerationFailedError(f"replicas died in each of {MAX_ATTEMPTS} attempts")


async def run_stages(stages: Stages, request: GenerationRequest, on_progress: OnProgress | None) -> Media:
    """Encoder, denoiser, VAE, once."""
    conditioning = stages.encoder.encode.remote(request)  # not awaited: the denoiser gets it by reference
    decode_inputs = await denoise(stages, request, conditioning, on_progress)
    media: Media = await stages.vae.decode.remote(request, decode_inputs)
    return media


async def denoise(
    stages: Stages, request: GenerationRequest, conditioning: Any, on_progress: OnProgress | None
) -> ray.ObjectRef[Any]:
    """Follows the denoiser's stream; returns a reference to the inputs of the VAE stage.

    The items of the stream belong to this process, so they outlive the replica that made them.
    """
    stream = stages.denoiser.options(stream=True).denoise.remote(request, conditioning)
    payload: PayloadFollows | None = None
    try:
        async for reference in await stream._to_object_ref_gen():
            if payload is not None:
                return reference
            item = await reference
            if isinstance(item, PayloadFollows):
                payload = item
            elif on_progress is not None:
                on_progress(item)
    except asyncio.CancelledError:
        stream.cancel()
        raise
    raise GenerationFailedError("the denoiser's stream ended without the inputs of the VAE stage")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
