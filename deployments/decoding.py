"""The VAE stage without Ray: the inputs of the decoders in, encoded files out."""

from __future__ import annotations

import time
from typing import Any

from deployments.denoising.hand_off import unpack_outcome
from deployments.encoding import call_arguments
from deployments.media import encode_media
from deployments.messages import DecodeInputs, GenerationRequest, Media
from deployments.stage_pipeline.decode_session import DecodeSession
from deployments.stage_pipeline.denoise_session import Result
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.loading import StagePipeline

DEFAULT_FPS = 16.0


def decode(stage: StagePipeline, request: GenerationRequest, inputs: DecodeInputs) -> Media:
    """Raises HandOffError where the picture would not be the pipeline's own."""
    started = time.perf_counter()
    output = decode_output(stage, request, inputs)
    decoded = time.perf_counter()
    media = encode_media(output, request, default_fps(stage), audio_sample_rate(stage))
    seconds = {"decode": decoded - started, "encode_media": time.perf_counter() - decoded}
    return Media(media.files, media.seconds | seconds)


def decode_output(stage: StagePipeline, request: GenerationRequest, inputs: DecodeInputs) -> Any:
    """What the unsplit pipeline would have returned with output_type "pt"."""
    outcome = unpack_outcome(inputs, stage)
    if isinstance(outcome, Result):
        return outcome.output
    return DecodeSession(stage, call_arguments(request), request.seed, outcome).run()


def default_fps(stage: StagePipeline) -> float:
    """Frames per second that the pipeline makes its motion for, where it says so; else 16, Wan's."""
    parameters, _ = call_parameters(type(stage.pipeline))
    return float(parameters.get("frame_rate") or parameters.get("fps") or DEFAULT_FPS)


def audio_sample_rate(stage: StagePipeline) -> int | None:
    """Samples per second of the sound that comes with the frames, where there is any."""
    vocoder = getattr(stage.pipeline, "vocoder", None)
    rate = getattr(getattr(vocoder, "config", None), "output_sampling_rate", None)
    return int(rate) if rate else None
