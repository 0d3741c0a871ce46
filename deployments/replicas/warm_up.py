"""`warm_up`: a replica takes requests when it has made those that the arguments name. It tells how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deployments.errors import CheckpointError, TriptychError
from deployments.media.pool import MediaPool
from deployments.messages import Conditioning, GenerationRequest
from deployments.replicas.threads import StageThreads
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.stages.warm_up import warm_denoiser, warm_vae
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

Encode = Callable[[GenerationRequest], Conditioning]
Tell = Callable[[str], None]  # "" when it is over


@dataclass(frozen=True)
class WarmReplica:
    """What of a replica is warmed up, for one of its models."""

    stage: StagePipeline
    threads: StageThreads
    denoiser: DenoiserStage | None
    media_pool: MediaPool | None


def warm_up(replica: WarmReplica, requests: Sequence[GenerationRequest], ask_encoder: Encode, tell: Tell) -> None:
    """Makes each request in all stages of the replica; the caller waits, in whatever thread.

    `ask_encoder` is used where the replica has no encoder. Raises CheckpointError for a request that the model refuses
    or cannot make, with its place in `warm_up`.
    """
    started = time.monotonic()
    try:
        for index, request in enumerate(requests):
            tell_of = _with_place(tell, f"warming up, request {index + 1} of {len(requests)}")
            try:
                # Not in the event loop's thread, where nobody may wait for another replica.
                with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
                    thread.submit(_make, replica, request, ask_encoder, tell_of).result()
            except Exception as error:
                if not isinstance(error, TriptychError) and not is_out_of_memory(error):
                    raise
                raise CheckpointError(f"warm_up[{index}]: {error}") from error
    finally:
        tell("")
    logger.info("warmed up by %d requests in %.1f s", len(requests), time.monotonic() - started)


def _make(replica: WarmReplica, request: GenerationRequest, ask_encoder: Encode, tell: Tell) -> None:
    stage = replica.stage
    tell("encoding")
    if "encoder" in stage.stages:
        conditioning = replica.threads.now_in_worker(encode, stage, request)
    else:
        conditioning = ask_encoder(request)
    if replica.denoiser is not None:
        tell("denoising")
        warm_denoiser(replica.denoiser, request, conditioning, tell)
    if replica.media_pool is not None:
        tell("decoding")
        decoded = replica.threads.now_in_worker(warm_vae, stage, request, conditioning)
        for file in decoded.files if decoded else ():
            replica.media_pool.write(file)


def _with_place(tell: Tell, place: str) -> Tell:
    return lambda text: tell(f"{place}: {text}")
