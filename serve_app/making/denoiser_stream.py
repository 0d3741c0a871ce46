"""The denoiser's stream as typed events: an announced payload counts when its bytes are in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from deployments.errors import GenerationFailedError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingBegun,
    DenoisingProgress,
    PayloadFollows,
    RequestWarning,
)


@dataclass(frozen=True)
class CheckpointArrived:
    """The denoising can go on from here, whatever dies."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class PreviewArrived:
    """What the VAE stage would be handed if `step` were the last."""

    step: int
    inputs: Any  # a reference to DecodeInputs


@dataclass(frozen=True)
class DecodeInputsArrived:
    """The denoising is over; `reference` leads to the same bytes where the denoiser left them."""

    inputs: DecodeInputs
    reference: Any
    seconds: dict[str, float]  # spent by the denoiser on this request


DenoiserEvent = (
    DenoisingBegun | DenoisingProgress | RequestWarning | CheckpointArrived | PreviewArrived | DecodeInputsArrived
)
PAYLOADS: dict[str, type[Any]] = {"checkpoint": Checkpoint, "preview": DecodeInputs, "decode_inputs": DecodeInputs}


class DenoiserStream:
    """One call of the denoiser, read up to the inputs of the VAE stage.

    Each item is read before it counts. What stands in the place of an item when a replica dies, or when its node
    takes the item with it, is an error: reading it raises that error, so it is never taken for a payload.
    """

    def __init__(self, call: Any) -> None:
        """`call`: what a streaming handle's `denoise.remote(...)` returned."""
        self._call = call

    async def events(self) -> AsyncIterator[DenoiserEvent]:
        """The last event is DecodeInputsArrived.

        Raises what the replica died of, and GenerationFailedError for a stream that ends before its last event or
        sends something else than it announced.
        """
        announced: PayloadFollows | None = None
        async for reference in await self._call._to_object_ref_gen():
            item = await reference
            if announced is not None:
                event = _arrived(announced, item, reference)
                announced = None
                yield event
                if isinstance(event, DecodeInputsArrived):
                    return
            elif isinstance(item, PayloadFollows):
                announced = item
            else:
                yield item
        raise GenerationFailedError("the denoiser's stream ended without the inputs of the VAE stage")

    def cancel(self) -> None:
        """Nobody reads on: the request leaves the denoiser at its next forward."""
        self._call.cancel()


def _arrived(announced: PayloadFollows, item: Any, reference: Any) -> DenoiserEvent:
    if type(item) is not PAYLOADS[announced.kind]:
        raise GenerationFailedError(f"the denoiser announced {announced.kind} and sent a {type(item).__name__}")
    if announced.kind == "checkpoint":
        return CheckpointArrived(item)
    if announced.kind == "preview":
        return PreviewArrived(announced.step, reference)
    return DecodeInputsArrived(item, reference, announced.seconds)
