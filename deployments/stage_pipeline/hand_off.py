"""The hand-off to the VAE stage as a message."""

from __future__ import annotations

import time
from typing import Any

from deployments.messages import DecodeInputs, RequestWarning
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import DecoderCall, HandOff, Result
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import without_opaque


def pack_outcome(
    outcome: HandOff | Result, num_steps: int | None = None, warnings: tuple[RequestWarning, ...] = ()
) -> DecodeInputs:
    """`num_steps`: scheduler steps that led to it; `warnings`: those of the conditioning."""
    if isinstance(outcome, Result):
        return DecodeInputs("result", pack(without_opaque(outcome.output)), time.time(), num_steps, warnings)
    content = {
        "encoder_calls": [[c.component, c.method, c.output, c.random_states, c.hooks] for c in outcome.encoder_calls],
        "events": outcome.events,
        "descriptions": outcome.descriptions,
        "decoder_calls": [[c.component, c.method, c.args, c.kwargs] for c in outcome.decoder_calls],
    }
    return DecodeInputs("decoder_calls", pack(without_opaque(content)), time.time(), num_steps, warnings)


def unpack_outcome(inputs: DecodeInputs, stage: StagePipeline) -> HandOff | Result:
    content: Any = unpack(inputs.content, stage.device)
    if inputs.kind == "result":
        return Result(content)
    return HandOff(
        encoder_calls=[EncoderCall(*call) for call in content["encoder_calls"]],
        events=content["events"],
        descriptions=content["descriptions"],
        decoder_calls=[DecoderCall(*call) for call in content["decoder_calls"]],
    )
