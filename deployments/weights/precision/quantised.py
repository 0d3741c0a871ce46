"""Fills a model of diffusers by one of diffusers' own quantisers: each linear weight is quantised when it comes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.auto import DiffusersAutoQuantizer

from deployments.weights.reading.assigning import assign


class Quantised:
    """Raises what the quantiser raises where it cannot work here."""

    def __init__(self, model: Any, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._quantiser: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        placement = {"": device}
        self._quantiser.validate_environment(torch_dtype=dtype, device_map=placement)
        kept = list(model._keep_in_fp32_modules or ())
        self._quantiser.preprocess_model(model=model, device_map=placement, keep_in_fp32_modules=kept)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        quantiser = self._quantiser
        if quantiser.check_if_quantized_param(self._model, tensor, name, {}, param_device=self._device):
            quantiser.create_quantized_param(
                self._model, tensor, name, self._device, {}, unexpected_keys=[], dtype=self._dtype
            )
        else:
            assign(self._model, name, tensor)

    def finish(self) -> None:
        self._quantiser.postprocess_model(self._model)
        self._model.hf_quantizer = self._quantiser
