"""Reads a model of diffusers: tensor by tensor to the device, where each gets its dtype and its precision."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights

from deployments.weights.files import StoredForm, WeightFiles
from deployments.weights.precision.scheme import Filling, Scheme
from deployments.weights.reading.assigning import assign
from deployments.weights.reading.missing import all_read
from deployments.weights.stream import TensorStream

logger = logging.getLogger(__name__)

Tensors = Callable[[WeightFiles, bool], TensorStream]  # of the files, whether they are to stay valid


def read_diffusers(
    cls: Any,
    folder: Path,
    weights: WeightFiles,
    dtype: torch.dtype | None,
    device: torch.device,
    tensors: Tensors,
    scheme: Scheme | None,
) -> Any:
    """The host holds one tensor after the other, or what `tensors` reads ahead."""
    model = construct_without_weights(cls, cls.load_config(folder), dtype)
    expected = model.state_dict()
    names = {name: name for name in weights.names}  # the model's name -> the file's
    if not weights.is_sharded:
        model._fix_state_dict_keys_on_load(names)  # attention blocks of old checkpoints
    name_in_model = {in_file: in_model for in_model, in_file in names.items()}
    report_unexpected(model, names.keys() - expected.keys(), folder)
    kept_in_fp32 = set(model._keep_in_fp32_modules or ())
    filling = filling_of(model, dtype, device, scheme)
    for in_file, tensor in tensors(weights, device.type == "cpu"):
        name = name_in_model[in_file]
        if name in expected:
            refuse_other_shape(name, tensor, expected[name])
            wanted = dtype_in_model(name, tensor, expected[name].dtype, dtype, kept_in_fp32)
            filling.put(name, on_device(tensor, device, wanted))
    filling.finish()
    model.register_to_config(_name_or_path=str(folder))
    return model


def read_quantised_diffusers(
    cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device
) -> Any:
    """By the quantiser that the component's configuration names."""
    return all_read(
        cls.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=form.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    )


def filling_of(model: Any, dtype: torch.dtype | None, device: torch.device, scheme: Scheme | None) -> Filling:
    if scheme is None:
        return Plain(model)
    assert scheme.begin is not None
    assert dtype is not None
    return scheme.begin(model, dtype, device)


class Plain:
    """Puts each weight in place as it comes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def put(self, name: str, tensor: torch.Tensor) -> None:
        assign(self._model, name, tensor)

    def finish(self) -> None:
        pass


def on_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The bytes go to the device as they are, and are cast there: the host would cast them in one thread."""
    return tensor.to(device).to(dtype)


def construct_without_weights(cls: Any, config: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """As from_pretrained does: parameters on meta; buffers real, computed with `dtype` as the default."""
    if issubclass(cls, LegacyModelMixin):
        cls = _fetch_remapped_cls_from_config(config, cls)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default_dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights():
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(default_dtype)


def dtype_in_model(
    name: str,
    tensor: torch.Tensor,
    constructed: torch.dtype,
    dtype: torch.dtype | None,
    kept_in_fp32: set[str],
) -> torch.dtype:
    """The rule of diffusers' load_model_dict_into_meta."""
    if dtype is None:
        return constructed
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_fp32.intersection(name.split(".")) else dtype


def refuse_other_shape(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ValueError."""
    if expected.shape != tensor.shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, the configuration says {list(expected.shape)}")


def report_unexpected(model: Any, unexpected: Collection[str], folder: Path) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = sorted(name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored))
    if names:
        logger.warning("%s: %d weights are not used: %s ...", folder, len(names), ", ".join(names[:3]))
