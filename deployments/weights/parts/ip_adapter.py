"""The IP-Adapters of a composed folder: their files, and how the pipeline's own `load_ip_adapter` puts them in."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.weights.files import read_object
from deployments.weights.parts.pipeline_class import classes_of, parameters_of

NOTE = "ip_adapter.json"  # in a composed folder
IMAGE_ENCODER = "image_encoder"  # as all pipelines that take IP-Adapters call it
# What the loaders of diffusers call the image encoder's place: None where it is loaded already, or not wanted.
IMAGE_ENCODER_PARAMETERS = ("image_encoder_folder", "image_encoder_pretrained_model_name_or_path")
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class IPAdapters:
    """Those of one pipeline, in the order in which a request gives their pictures."""

    files: tuple[str, ...]  # safetensors
    scale: tuple[float, ...] | None
    brings_image_encoder: bool  # the pipeline has none of its own
    image_encoder_dtype: str | None  # in which their loader holds it; None: as the other components are held

    def write(self, folder: Path) -> None:
        (folder / NOTE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_ip_adapters(folder: Path) -> IPAdapters | None:
    """Those that were put into a composed folder."""
    if not (folder / NOTE).is_file():
        return None
    said = read_object(folder / NOTE)
    scale = None if said["scale"] is None else tuple(said["scale"])
    return IPAdapters(tuple(said["files"]), scale, said["brings_image_encoder"], said["image_encoder_dtype"])


def loader_dtype(pipeline_class: Any) -> str | None:
    """The dtype that a pipeline's loader itself has for image encoders."""
    parameter = inspect.signature(pipeline_class.load_ip_adapter).parameters.get("image_encoder_dtype")
    return str(parameter.default).removeprefix("torch.") if parameter is not None else None


def install_ip_adapters(pipeline: Any, adapters: IPAdapters, folder: Path) -> None:
    """The denoiser reads pictures from here on; what it is a skeleton of gets skeletons. Raises CheckpointError."""
    loader = inspect.signature(pipeline.load_ip_adapter).parameters
    nowhere = {name: None for name in IMAGE_ENCODER_PARAMETERS if name in loader}
    files = [Path(file) for file in adapters.files]
    places = {"weight_name": [file.name for file in files], "subfolder": [""] * len(files)}
    folders = [str(file.parent) for file in files]
    models = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    skeletons = [model for model in models if any(parameter.is_meta for parameter in model.parameters())]
    try:
        if len(files) == 1:
            one = {name: values[0] for name, values in places.items()}
            pipeline.load_ip_adapter(folders[0], **one, **nowhere, local_files_only=True)
        else:
            pipeline.load_ip_adapter(folders, **places, **nowhere, local_files_only=True)
        if adapters.scale is not None:
            pipeline.set_ip_adapter_scale(adapters.scale[0] if len(files) == 1 else list(adapters.scale))
        add_feature_extractor(pipeline, folder)
    except UNREADABLE as error:
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"components.ip_adapter: {files[0]} cannot be loaded: {cause}") from error
    for model in skeletons:
        drop_weights(model)


def add_feature_extractor(pipeline: Any, folder: Path) -> None:
    """Where the loader leaves it to the image encoder's own settings."""
    if getattr(pipeline, "feature_extractor", False) is None and (folder / IMAGE_ENCODER).is_dir():
        [cls] = classes_of(parameters_of(type(pipeline))["feature_extractor"])
        pipeline.register_modules(feature_extractor=cls.from_pretrained(folder / IMAGE_ENCODER, local_files_only=True))


def drop_weights(skeleton: torch.nn.Module) -> None:
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
