"""Layerwise casting of diffusers: weights are kept in float8 and cast up for the length of their layer's forward."""

from __future__ import annotations

from typing import Any

import torch

from deployments.weights.reading.assigning import assign

STORED = torch.float8_e4m3fn


class Layerwise:
    """The hooks come first, on the empty model: its weights then say which of them are kept in float8."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        model.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=dtype)
        self._stored = {name for name, tensor in model.state_dict().items() if tensor.dtype == STORED}
        if not self._stored:
            raise ValueError(f"{type(model).__name__} has no layer that layerwise casting applies to")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        assign(self._model, name, tensor.to(STORED) if name in self._stored else tensor)

    def finish(self) -> None:
        """Nothing is left to do."""


def obstacle_of(device: torch.device) -> str | None:
    try:
        torch.ones(1, device=device).to(STORED).to(torch.bfloat16)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"{device.type} cannot cast float8: {str(error).strip().partition(chr(10))[0]}"
    return None
