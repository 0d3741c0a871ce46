"""Builds the part of a pipeline that a process of some stages holds: its weights, accelerated. Knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from deployments.accelerations import install_all
from deployments.accelerations.compile import modes_of
from deployments.devices import Device
from deployments.errors import CheckpointError
from deployments.features import install_features
from deployments.memory.args import OffloadArgs
from deployments.memory.autoencoder import prepare, refuse_switches
from deployments.memory.device_memory import TorchMemory
from deployments.memory.offload import install_offload, refuse_offload
from deployments.memory.stage_memory import StageMemory
from deployments.memory.turns import Turns
from deployments.messages import StageName
from deployments.model import CompileMode, ModelArgs
from deployments.modules import AccelerationError, Kernel, StageModules, unwrapped
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.loading import StagePipeline, load_stage, weights_needed
from deployments.stage_pipeline.roles import PipelineLayout, denoising_models, read_layout
from deployments.stage_pipeline.skeleton import meta_twin_maker
from deployments.stages.adapters import with_adapters
from deployments.stages.ranks.beside import refuse_beside_ranks
from deployments.weights.parts.compose import resolve_model
from deployments.weights.precision.chosen import by_component, own_files_needed, with_files
from deployments.weights.precision.computing import dtype_computed_in
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
    exceptions = autoencoder_dtypes(model, read_layout(folder)) | exceptions
    use_streamer = env.runtime.use_runai_model_streamer
    where = device.torch_device
    stage = load_stage(
        folder, stages, where, dtype, use_streamer, exceptions, model.variant, held, precision, model.offload
    )
    check_default_arguments(model, stage)
    refuse_switches({name: stage.layout.models[name] for name in stage.layout.autoencoders}, model.vae)
    refuse_offload(model.offload, stage.layout.models)
    modes = modes_of(model.compile, stage.layout.denoisers)
    refuse_whole_with_offload(modes, model.offload)
    refuse_beside_ranks(model, modes, env)
    if held is not None:
        return stage
    if model.dtype == "auto" and (warning := float32_warning(stage)):
        logger.warning("%s", warning)
    modules = stage_modules(stage, device, wrap_kernel, modes)
    stage, lines = fitted(stage, modules, model)
    stage = with_adapters(stage, model, env.runtime.cache_root)
    lines += [f"precision: {name} is held as {each}" for name, each in stage.precisions.items()]
    # Features come last: Cache-DiT keeps the forwards that it finds.
    for line in (*lines, *install_all(modules, env), *install_features(modules, env)):
        logger.info("%s", line)
    return stage


def refuse_whole_with_offload(modes: Mapping[str, CompileMode], offload: Mapping[str, OffloadArgs]) -> None:
    """Raises AccelerationError: Dynamo cannot trace how weights come and go inside of the forward that it compiles."""
    for name, mode in modes.items():
        if mode == "whole" and name in offload and offload[name].kind == "model":
            raise AccelerationError(
                f"compile: {name}: whole is not possible with kind: model of offload.{name}; "
                "regional is allowed, or kind: group"
            )


def autoencoder_dtypes(model: ModelArgs, layout: PipelineLayout) -> dict[str, torch.dtype]:
    """What `vae: {dtype}` asks for. Raises CheckpointError where `component_dtypes` asks for another one."""
    if model.vae.dtype == "auto":
        return {}
    for name in layout.autoencoders:
        if (other := model.component_dtypes.get(name, model.vae.dtype)) != model.vae.dtype:
            raise CheckpointError(f"vae: dtype is {model.vae.dtype}, and component_dtypes says {name}: {other}")
    return dict.fromkeys(layout.autoencoders, getattr(torch, model.vae.dtype))


def fitted(stage: StagePipeline, modules: StageModules, model: ModelArgs) -> tuple[StagePipeline, list[str]]:
    """The stage with what makes it fit on its device, and the lines for the log. Raises AccelerationError."""
    turns = Turns(stage.device)
    is_steady = model.denoising.deterministic
    memory = StageMemory(TorchMemory(stage.device), bytes_that_stay(stage, model), turns, is_steady)
    lines = []
    for name, module in modules.parts(modules.autoencoders).items():
        folder = stage.layout.folder / name
        twin = meta_twin_maker(module, stage.layout.models[name], folder, dtype_computed_in(module))
        lines.append(prepare(name, module, twin, model.vae, memory))
    return replace(stage, memory=memory), [*lines, *install_offload(modules, model.offload, turns)]


def bytes_that_stay(stage: StagePipeline, model: ModelArgs) -> int:
    """Of the weights that are on the device all the time."""
    return sum(size for name, size in stage.weight_bytes().items() if name not in model.offload)


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
