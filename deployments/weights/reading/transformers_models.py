"""Reads a model of transformers: renamed keys, tied weights and dtypes are from_pretrained's own doing.

It is given the weights on the device already, each when it asks for it, so that it casts and quantises them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from deployments.weights.files import StoredForm, WeightFiles
from deployments.weights.precision.scheme import Scheme
from deployments.weights.reading.mapped import mapped_by_name
from deployments.weights.reading.missing import all_read
from deployments.weights.stream import stream_tensors


class Given:
    """A tensor that is handed over when somebody takes its elements, `given[...]`, and not held any longer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor

    def __getitem__(self, _: Any) -> torch.Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor


def read_transformers(
    cls: Any,
    folder: Path,
    weights: WeightFiles,
    dtype: torch.dtype | None,
    device: torch.device,
    is_streamed: bool,
    scheme: Scheme | None,
) -> Any:
    """The host holds what the streamer reads ahead, or pages of the files."""
    state = streamed_by_name(weights, device) if is_streamed else mapped_by_name(weights, device)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if device.type not in ("cpu", "meta"):
        options["device_map"] = {"": device}
    if scheme is not None:
        assert scheme.for_transformers is not None
        assert dtype is not None
        options["quantization_config"] = scheme.for_transformers(dtype, device)
    with base_reading_replaced(partial(read_from, state, folder)):
        model = all_read(cls.from_pretrained(folder, **options))
    model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = read_generation_config(folder)
    return model


def read_quantised_transformers(
    cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device
) -> Any:
    """By the quantiser that the component's configuration names."""
    return all_read(
        cls.from_pretrained(
            str(folder),
            dtype=dtype,
            weights_only=True,
            variant=form.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    )


def streamed_by_name(weights: WeightFiles, device: torch.device) -> dict[str, Given]:
    keep = device.type == "cpu"
    return {name: Given(tensor.to(device)) for name, tensor in stream_tensors(weights, keep)}


def read_from(
    state: Mapping[str, Any],
    folder: Path,
    read: Callable[..., Any],
    klass: Any,
    path: Any,
    *args: Any,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """`read(klass, path)`, which takes the weights of `folder` from `state`."""
    if str(path) != str(folder):  # a part that has files of its own
        return read(klass, path, *args, config=config, **kwargs)
    config = config or klass.config_class.from_pretrained(path)
    return read(klass, None, *args, config=config, state_dict=state, **kwargs)


@contextmanager
def base_reading_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """PreTrainedModel.from_pretrained becomes `replacement(read, cls, path, ...)`; `read` is the method as it was.

    Some classes override from_pretrained to choose another class or configuration (the T5GemmaEncoder of diffusers
    takes the encoder's part of its config): theirs is called as ever, only the base method that they call is another.
    """
    base: Any = PreTrainedModel
    reading = base.__dict__["from_pretrained"]
    base.from_pretrained = classmethod(partial(replacement, reading.__func__))
    try:
        yield
    finally:
        base.from_pretrained = reading


def read_generation_config(folder: Path) -> Any:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
