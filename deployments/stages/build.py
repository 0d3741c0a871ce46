"""Builds the part of a pipeline that a process of some stages holds: its weights, accelerated. Knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from deployments.accelerations import install_all
from deployments.accelerations.compile import modes_of
from deployments.devices import Device
from deployments.errors import CheckpointError
from deployments.features import install_features
from deployments.messages import StageName
from deployments.model import CompileMode, ModelArgs
from deployments.modules import Kernel, StageModules, unwrapped
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.loading import StagePipeline, load_stage, weights_needed
from deployments.stage_pipeline.roles import denoising_models, read_layout
from deployments.weights.parts.compose import resolve_model
from deployments.weights.precision.chosen import by_component, own_files_needed, with_files
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)


def build_stage(
    model: ModelArgs,
    stages: tuple[StageName, ...],
    env: EnvConfig,
    device: Device,
    wrap_kernel: Callable[[str, Kernel], Kernel] = unwrapped,
    held: Mapping[str, torch.nn.Module] | None = None,
) -> StagePipeline:
    """The stages of the model on the device, with the accelerations and features that the variables ask for.

    `wrap_kernel` is given each kernel that an acceleration installs. `held` are components that this process has
    already, with all that was put into them: they are neither loaded nor changed.

    Raises CheckpointError for a model that cannot be served as `model` says, AccelerationError for an acceleration
    that cannot be had here.
    """
    folder, precision = fetch(model, stages, env)
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    exceptions = {name: getattr(torch, value) for name, value in model.component_dtypes.items()}
    use_streamer = env.runtime.use_runai_model_streamer
    where = device.torch_device
    stage = load_stage(folder, stages, where, dtype, use_streamer, exceptions, model.variant, held, precision)
    check_default_arguments(model, stage)
    if held is not None:
        return stage
    if model.dtype == "auto" and (warning := float32_warning(stage)):
        logger.warning("%s", warning)
    modules = stage_modules(stage, device, wrap_kernel, modes_of(model.compile, stage.layout.denoisers))
    # Features come last: Cache-DiT keeps the forwards that it finds.
    held_in = (f"precision: {name} is held as {each}" for name, each in stage.precisions.items())
    for line in (*held_in, *install_all(modules, env), *install_features(modules, env)):
        logger.info("%s", line)
    return stage


def fetch(model: ModelArgs, stages: tuple[StageName, ...], env: EnvConfig) -> tuple[Path, dict[str, str]]:
    """The local folder of the checkpoint, with the weights that the stages need, and the precision by component, with
    the files that it names. Raises CheckpointError.
    """
    cache_root, use_streamer = env.runtime.cache_root, env.runtime.use_runai_model_streamer

    def resolve(components: Collection[str]) -> Path:
        return resolve_model(model, cache_root, components, use_streamer)

    settings = resolve(())
    layout = read_layout(settings)
    precision = by_component(model.precision, layout.models, denoising_models(layout.models))
    needed = weights_needed(settings, stages)
    folder = resolve(own_files_needed(needed, precision))
    return folder, with_files(precision, needed, cache_root)


def float32_warning(stage: StagePipeline) -> str | None:
    """A sentence where an accelerator was given weights in float32, because they are stored so."""
    if stage.device.type == "cpu":
        return None
    found = {}
    for name, component in stage.components.items():
        num_bytes = sum(p.numel() * p.element_size() for p in component.parameters() if p.dtype == torch.float32)
        if name not in stage.layout.autoencoders and 2 * num_bytes > stage.weight_bytes()[name]:
            found[name] = num_bytes
    if not found:
        return None
    sizes = ", ".join(f"{name} ({num_bytes / 1e9:.1f} GB)" for name, num_bytes in found.items())
    return (
        f"dtype: auto puts {sizes} on {stage.device} in float32, as stored: dtype: bfloat16 takes half of the memory "
        "and far less time (allowed: auto, float32, bfloat16, float16; component_dtypes for exceptions)"
    )


def check_default_arguments(model: ModelArgs, stage: StagePipeline) -> None:
    """Raises CheckpointError for a default, or an argument of a level of quality, that the call does not take."""
    pipeline_class = type(stage.pipeline)
    parameters, _ = call_parameters(pipeline_class)
    levels = {f"quality.{level}": arguments for level, arguments in model.quality.items()}
    for setting, arguments in {"default_arguments": model.default_arguments, **levels}.items():
        if unknown := sorted(set(arguments) - set(parameters)):
            raise CheckpointError(
                f"{setting} names {', '.join(unknown)}, which {pipeline_class.__name__} does not take; "
                f"it takes {', '.join(sorted(parameters))}"
            )


def stage_modules(
    stage: StagePipeline,
    device: Device,
    wrap_kernel: Callable[[str, Kernel], Kernel] = unwrapped,
    compile_modes: Mapping[str, CompileMode] | None = None,
) -> StageModules:
    """What accelerations and features may touch: the components that this process holds."""
    components = stage.components
    return StageModules(
        stages=stage.stages,
        components=components,
        denoisers=tuple(n for n in stage.layout.denoisers if n in components),
        autoencoders=tuple(n for n in stage.layout.autoencoders if n in components),
        device=device,
        wrap_kernel=wrap_kernel,
        compile=compile_modes or {},
        switches=stage.switches,
    )
