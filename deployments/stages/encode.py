"""The encoder stage without Ray: a request in, its conditioning out."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import torch

from deployments.media.input_sounds import read_sound
from deployments.media.inputs import decode_input_image, decode_mask
from deployments.messages import Conditioning, GenerationRequest, InputImage, InputSound, RequestWarning
from deployments.stage_pipeline.description import reads_alpha
from deployments.stage_pipeline.hand_off import row_of
from deployments.stage_pipeline.inputs.values import (
    Waveform,
    as_pipeline_takes,
    call_inputs_of,
    rate_arguments,
    sound_format,
)
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.encode import EncoderCall, EncodeSession
from deployments.stage_pipeline.sessions.plays.unread import without_unread
from deployments.stages.adapters import adapters_around, brought, uses_of
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import with_anything

MAX_INPUT_PIXELS = 50_000_000  # far above what any model takes; the ingress has its own, lower limit
MAX_SOUND_S = 3_600.0
MASK = re.compile(r"(^|_)mask(_|$)")  # mask_image, mask, control_mask, mask_video ...


def encode(stage: StagePipeline, request: GenerationRequest) -> Conditioning:
    """Runs the text and image encoders.

    Raises InvalidRequestError for what the pipeline refuses, DeviceFullError or TooLargeForDeviceError.
    """
    arguments = call_arguments(stage, request)
    found = brought(stage, uses_of(request))
    around = adapters_around(stage, found)

    def work() -> Conditioning:
        session = EncodeSession(stage, arguments, request.seed)
        session.around_component = around
        calls = session.run()
        return pack_conditioning(without_unread(stage, arguments, calls), stage.device, cut_texts(session))

    conditioning = stage.memory.run(work, is_steady=request.deterministic)
    return replace(conditioning, adapters={use.name: use.digest for use, _ in found})


def cut_texts(session: EncodeSession) -> tuple[RequestWarning, ...]:
    """A warning for each text that was not read to its end."""
    return tuple(
        RequestWarning("text_cut", name, f"{name} has {tokens} tokens, of which the first {limit} are read")
        for name, (tokens, limit) in session.texts.cut.items()
    )


def call_arguments(stage: StagePipeline, request: GenerationRequest) -> dict[str, Any]:
    """The request's arguments as the pipeline takes them."""
    return decode_arguments(stage, request.arguments)


def decode_arguments(stage: StagePipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with decoded pictures, masks and sounds in place of files, each of the type that is taken."""
    keep_alpha = reads_alpha(stage)
    rate, channels = sound_format(stage.pipeline)
    rates: set[int] = set()

    def decoded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(name, item) for item in value]
        if isinstance(value, dict):
            return {key: decoded(key, item) for key, item in value.items()}
        if isinstance(value, InputSound):
            sound = read_sound(value.data, name, MAX_SOUND_S, rate, channels)
            rates.add(sound.rate)
            return Waveform(sound.samples)
        if not isinstance(value, InputImage):
            return value
        if MASK.search(name):
            return decode_mask(value, MAX_INPUT_PIXELS, name, by_alpha=value == _first(arguments.get("image")))
        return decode_input_image(value, MAX_INPUT_PIXELS, name, keep_alpha)

    pipeline_class: type = type(stage.pipeline)
    taken = {name: as_pipeline_takes(pipeline_class, name, decoded(name, value)) for name, value in arguments.items()}
    if len(rates) == 1:  # the pipeline is told to what the sounds were resampled
        [rate] = rates
        taken = dict.fromkeys(rate_arguments(call_inputs_of(pipeline_class)), rate) | taken
    return taken


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def pack_conditioning(
    calls: list[EncoderCall], device: torch.device, warnings: tuple[RequestWarning, ...] = ()
) -> Conditioning:
    """What a stage on `device` recorded. Caches, which cannot leave their process, are replaced by a placeholder."""
    return Conditioning(pack([row_of(call, device) for call in calls]), time.time(), warnings)


def unpack_conditioning(conditioning: Conditioning, stage: StagePipeline) -> list[EncoderCall]:
    return [EncoderCall(*call) for call in with_anything(unpack(conditioning.calls, stage.device))]
