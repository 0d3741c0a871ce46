"""What a pipeline takes and makes, read from its class, its call's signature and its components' configurations."""

from __future__ import annotations

import inspect
import os
from typing import Any

from deployments.messages import StageDescription
from deployments.stage_pipeline.inputs.fields import argument_fields
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.outputs import media_kind
from deployments.stage_pipeline.tasks import tasks_of

# Set by Triptych itself in every call, or of no effect on what is answered, so not for callers.
OWN_PARAMETERS = frozenset(
    {"self", "generator", "output_type", "return_dict", "callback_on_step_end", "latents", "output_latent"}
)
RGBA = 4


def describe_stage(stage: StagePipeline) -> StageDescription:
    """Raises CheckpointError for a pipeline that makes nothing that is served."""
    parameters, _ = call_parameters(type(stage.pipeline))
    fields = argument_fields(type(stage.pipeline))
    width, height = default_size(stage, parameters)
    kind = media_kind(type(stage.pipeline))
    return StageDescription(
        stages=stage.stages,
        pipeline_class=type(stage.pipeline).__name__,
        parameters=parameters,
        required=tuple(name for name in parameters if fields[name].is_needed),
        media_kind=kind,
        size_multiple=size_multiple(stage),
        default_width=width,
        default_height=height,
        device=str(stage.device),
        dtype=str(stage.dtype or "as stored").removeprefix("torch."),
        weight_bytes=stage.weight_bytes(),
        process_id=os.getpid(),
        argument_types={name: fields[name].type for name in parameters},
        argument_notes={name: field.notes for name, field in fields.items()},
        tasks=tasks_of(type(stage.pipeline), kind),
        frame_multiple=frame_multiple(stage),
        makes_alpha=makes_alpha(stage),
        takes_adapters=stage.adapters is not None and stage.adapters.takes_adapters,
        shared=dict(stage.shared),
    )


def call_parameters(pipeline_class: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The parameters of `__call__` with their plain defaults, and the names of those without a default."""
    defaults: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(pipeline_class.__call__).parameters.items():
        if name in OWN_PARAMETERS or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            required.append(name)
        plain = isinstance(parameter.default, bool | int | float | str)
        defaults[name] = parameter.default if plain else None
    return defaults, tuple(required)


def size_multiple(stage: StagePipeline) -> int:
    """Pixels that width and height must be a multiple of: the VAE's scale times the denoiser's patch."""
    pipeline = stage.pipeline
    scales = [1]
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        scale = getattr(pipeline, name, None)
        if isinstance(scale, int):
            patch = max((_spatial_patch(getattr(pipeline, d, None)) for d in stage.layout.denoisers), default=1)
            scales.append(scale * patch)
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        if config is not None and isinstance(config.get("vae_scale_factor"), int):
            scales.append(config["vae_scale_factor"])
    return max(scales)


def reads_alpha(stage: StagePipeline) -> bool:
    """Whether the pipeline's autoencoder takes pictures of four channels."""
    return _vae_channels(stage, "in_channels") == RGBA


def makes_alpha(stage: StagePipeline) -> bool:
    """Whether the pipeline's autoencoder makes pictures of four channels."""
    return _vae_channels(stage, "out_channels") == RGBA


def _vae_channels(stage: StagePipeline, name: str) -> int | None:
    config = getattr(getattr(stage.pipeline, "vae", None), "config", None)
    if config is None:
        return None
    channels = config.get(name, config.get("input_channels"))  # AutoencoderKLQwenImage has one number for both
    return channels if isinstance(channels, int) else None


def frame_multiple(stage: StagePipeline) -> int:
    """Frames that one frame of the latents stands for, after the first; 1 where that is not known."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"):
        if isinstance(scale := getattr(stage.pipeline, name, None), int) and scale > 0:
            return scale
    return 1


def _spatial_patch(denoiser: Any) -> int:
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    if isinstance(patch, list | tuple):
        patch = patch[-1]
    return patch if isinstance(patch, int) and patch > 0 else 1


def default_size(stage: StagePipeline, parameters: dict[str, Any]) -> tuple[int | None, int | None]:
    """Width and height in pixels that the pipeline takes when none are given, where they can be known."""
    width, height = parameters.get("width"), parameters.get("height")
    if width and height:
        return width, height
    sample = getattr(stage.pipeline, "default_sample_size", None)
    scale = getattr(stage.pipeline, "vae_scale_factor", None)
    if isinstance(sample, int) and isinstance(scale, int):
        return sample * scale, sample * scale
    width, height = (getattr(stage.pipeline, f"default_{side}", None) for side in ("width", "height"))
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (None, None)
