"""The requests that a model must be able to make: its own default arguments, and as little else as it asks for."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from deployments.messages import GenerationRequest, StageDescription
from deployments.needed_inputs import FEW_FRAMES, FEW_SECONDS, OUTPUTS, needed_inputs

SMALL_SIDE = 8  # multiples of the model's own: some pixels of latents, which little work is needed for
FEW_STEPS = 2
PLAIN_SIDE = 512  # pixels of a picture where the model has no size of its own


def default_requests(
    description: StageDescription, model: str, usual_arguments: dict[str, Any]
) -> Iterator[GenerationRequest]:
    """The cheapest first: small and short, of the model's own size, wholly by default."""
    steps = {"num_inference_steps": FEW_STEPS}
    small = description.size_multiple * SMALL_SIDE
    sizes: dict[str, float] = {"width": small, "height": small, "num_frames": FEW_FRAMES}
    if description.length_argument is not None:
        sizes[description.length_argument] = FEW_SECONDS
    own_side = description.default_width or PLAIN_SIDE
    for changes, side in ((steps | sizes, small), (steps, own_side), ({}, own_side)):
        changed = {name: value for name, value in changes.items() if description.takes(name)}
        arguments = usual_arguments | needed_inputs(description, side) | changed
        yield GenerationRequest(f"default-{uuid.uuid4().hex}", model, arguments, 0, OUTPUTS[description.media_kind])
