"""The hand-off to the VAE stage as a message; where the decoders are in the same process, it stays there as well.

The message goes its way all the same. It is what another process reads, and this one when it decodes a second time.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import torch

from deployments.messages import DecodeInputs, RequestWarning
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import DecoderCall, HandOff, Result, check_numbers
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.tensors.packing import made_on, pack, unpack
from deployments.tensors.values import without_opaque

MOST_KEPT = 16  # hand-offs: of those that another process decodes, or nobody, the oldest are let go of


def pack_outcome(
    outcome: HandOff | Result,
    device: torch.device,
    num_steps: int | None = None,
    warnings: tuple[RequestWarning, ...] = (),
    here: StagePipeline | None = None,
) -> DecodeInputs:
    """What came out of a stage on `device`.

    `num_steps`: scheduler steps that led to it; `warnings`: those of the conditioning and the denoising.
    `here`: the stage of this process, where it has the decoders too, which then keeps the hand-off for itself.

    Raises NotNumbersError for arguments of a decoder that are none.
    """
    if isinstance(outcome, Result):
        return DecodeInputs("result", pack(without_opaque(outcome.output)), time.time(), num_steps, warnings)
    check_numbers(outcome)
    content = {
        "encoder_calls": [row_of(call, device) for call in outcome.encoder_calls],
        "events": outcome.events,
        "descriptions": made_on(device, without_opaque(outcome.descriptions)),
        "decoder_calls": [
            [c.component, c.method, made_on(device, without_opaque(c.args)), made_on(device, without_opaque(c.kwargs))]
            for c in outcome.decoder_calls
        ],
    }
    packed = pack(content)
    token = _keep(here.handed_over, outcome) if here is not None else ""
    return DecodeInputs("decoder_calls", packed, time.time(), num_steps, warnings, token)


def row_of(call: EncoderCall, device: torch.device) -> list[Any]:
    """The fields of a call that a stage on `device` recorded or replayed, for `pack`."""
    output = made_on(device, without_opaque(call.output))
    return [call.component, call.method, output, *without_opaque([call.random_states, call.hooks])]


def unpack_outcome(inputs: DecodeInputs, stage: StagePipeline) -> HandOff | Result:
    kept: HandOff | None = stage.handed_over.pop(inputs.token, None)  # once: the decoding may change it
    if kept is not None:
        return kept
    content: Any = unpack(inputs.content, stage.device)
    if inputs.kind == "result":
        return Result(content)
    return HandOff(
        encoder_calls=[EncoderCall(*call) for call in content["encoder_calls"]],
        events=content["events"],
        descriptions=content["descriptions"],
        decoder_calls=[DecoderCall(*call) for call in content["decoder_calls"]],
    )


def _keep(kept: dict[str, Any], outcome: HandOff) -> str:
    """Its token."""
    while len(kept) >= MOST_KEPT:
        kept.pop(next(iter(kept)), None)
    token = uuid.uuid4().hex
    kept[token] = outcome
    return token
