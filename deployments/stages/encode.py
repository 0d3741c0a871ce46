"""The encoder stage without Ray: a request in, its conditioning out."""

from __future__ import annotations

import re
import time
from typing import Any

from deployments.media.inputs import decode_input_image, decode_mask
from deployments.messages import Conditioning, GenerationRequest, InputImage, RequestWarning
from deployments.stage_pipeline.description import reads_alpha
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.encode import EncoderCall, EncodeSession
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import with_anything, without_opaque

MAX_INPUT_PIXELS = 50_000_000  # far above what any model takes; the ingress has its own, lower limit
_MASK = re.compile(r"(^|_)mask(_|$)")  # mask_image, mask, control_mask, mask_video ...


def encode(stage: StagePipeline, request: GenerationRequest) -> Conditioning:
    """Runs the text and image encoders; raises InvalidRequestError for what the pipeline refuses."""
    session = EncodeSession(stage, call_arguments(stage, request), request.seed)
    return pack_conditioning(session.run(), cut_texts(session))


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
    """The arguments with decoded pictures and masks in place of files."""
    keep_alpha = reads_alpha(stage)

    def decoded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(name, item) for item in value]
        if not isinstance(value, InputImage):
            return value
        if _MASK.search(name):
            return decode_mask(value, MAX_INPUT_PIXELS, name, by_alpha=value == _first(arguments.get("image")))
        return decode_input_image(value, MAX_INPUT_PIXELS, name, keep_alpha)

    return {name: decoded(name, value) for name, value in arguments.items()}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def pack_conditioning(calls: list[EncoderCall], warnings: tuple[RequestWarning, ...] = ()) -> Conditioning:
    """Objects that cannot leave their process (caches) are replaced by a placeholder, tensors are kept."""
    packed = pack([[c.component, c.method, *without_opaque([c.output, c.random_states, c.hooks])] for c in calls])
    return Conditioning(packed, time.time(), warnings)


def unpack_conditioning(conditioning: Conditioning, stage: StagePipeline) -> list[EncoderCall]:
    return [EncoderCall(*call) for call in with_anything(unpack(conditioning.calls, stage.device))]
