"""Builds the part of a pipeline that a process of some stages holds: its weights, accelerated. Knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
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
from deployments.stages.ranks.beside import refuse_beside_ranks, refuse_beside_tile_ranks
from deployments.weights.parts.compose import resolve_model
from deployments.weights.precision.chosen import by_component, own_files_needed, with_files
from deployments.weights.precision.computing import dtype_computed_in
from deployments.weights.shared.pool import ComponentPool, Settings
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
    if held is None:
        return build_stages((model,), stages, env, device, wrap_kernel)[model.name]
    return loaded(model, stages, env, device, held=held)


def build_stages(
    models: Sequence[ModelArgs],
    stages: tuple[StageName, ...],
    env: EnvConfig,
    device: Device,
    wrap_kernel: Callable[[str, Kernel], Kernel] = unwrapped,
) -> dict[str, StagePipeline]:
    """The same for all models of one process, by their names: components that are proved to be equal are there once.

    Raises as `build_stage`.
    """
    pool = ComponentPool() if len(models) > 1 else None
    found = {model.name: loaded(model, stages, env, device, pool=pool) for model in models}
    if pool is not None:
        found = {name: replace(stage, shared=pool.shared_by(name)) for name, stage in found.items()}
        tell_shared(pool, found)
    turns = Turns(device.torch_device)
    is_steady = any(model.denoising.deterministic for model in models)
    memory = StageMemory(TorchMemory(device.torch_device), bytes_that_stay(found, models), turns, is_steady)
    ready = {}
    for model in models:
        stage = replace(found[model.name], memory=memory)
        ready[model.name] = made_ready(stage, model, env, device, wrap_kernel, turns)
    return ready


def loaded(
    model: ModelArgs,
    stages: tuple[StageName, ...],
    env: EnvConfig,
    device: Device,
    held: Mapping[str, torch.nn.Module] | None = None,
    pool: ComponentPool | None = None,
) -> StagePipeline:
    """The weights on the device, with what the model's arguments say held against them."""
    folder, precision = fetch(model, stages, env)
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    exceptions = {name: getattr(torch, value) for name, value in model.component_dtypes.items()}
    exceptions = autoencoder_dtypes(model, read_layout(folder)) | exceptions
    use_streamer = env.runtime.use_runai_model_streamer
    where, settings = device.torch_device, Settings(model.offload, model.vae, gets_adapters(model))
    own = pool.of_model(model.name, settings) if pool is not None else None
    stage = load_stage(
        folder, stages, where, dtype, use_streamer, exceptions, model.variant, held, precision, model.offload, own
    )
    check_default_arguments(model, stage)
    refuse_switches({name: stage.layout.models[name] for name in stage.layout.autoencoders}, model.vae)
    refuse_offload(model.offload, stage.layout.models)
    modes = modes_of(model.compile, stage.layout.denoisers)
    refuse_whole_with_offload(modes, model.offload)
    refuse_beside_ranks(model, modes, env)
    refuse_beside_tile_ranks(model, stage.layout.autoencoders)
    return stage if own is None else replace(stage, borrowed=frozenset(own.borrowed))


def gets_adapters(model: ModelArgs) -> bool:
    """Whether LoRAs may be put into its components: those of its configuration, or what is added while it runs."""
    return bool(model.adapters) or model.takes_new_adapters


def tell_shared(pool: ComponentPool, stages: Mapping[str, StagePipeline]) -> None:
    for line in pool.lines:
        logger.info("%s", line)
    for name, stage in stages.items():
        if not stage.shared:
            logger.warning(
                "share: %s has nothing in common with the other models of this process, %s: it may be left out of "
                "`share`",
                name,
                " and ".join(other for other in stages if other != name),
            )


def made_ready(
    stage: StagePipeline,
    model: ModelArgs,
    env: EnvConfig,
    device: Device,
    wrap_kernel: Callable[[str, Kernel], Kernel],
    turns: Turns,
) -> StagePipeline:
    """With what its variables and arguments ask for in its own components; those that it borrows have it."""
    if model.dtype == "auto" and (warning := float32_warning(stage)):
        logger.warning("%s", warning)
    modes = modes_of(model.compile, stage.layout.denoisers)
    modules = stage_modules(stage, device, wrap_kernel, modes)
    if stage.borrowed and not modules.components:
        return with_adapters(stage, model, env.runtime.cache_root)
    lines = fitted(stage, modules, model, turns)
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


def fitted(stage: StagePipeline, modules: StageModules, model: ModelArgs, turns: Turns) -> list[str]:
    """Makes the components fit on their device; the lines for the log. Raises AccelerationError."""
    lines = []
    for name, module in modules.parts(modules.autoencoders).items():
        folder = stage.layout.folder / name
        twin = meta_twin_maker(module, stage.layout.models[name], folder, dtype_computed_in(module))
        lines.append(prepare(name, module, twin, model.vae, stage.memory))
    return [*lines, *install_offload(modules, model.offload, turns)]


def bytes_that_stay(stages: Mapping[str, StagePipeline], models: Sequence[ModelArgs]) -> int:
    """Of the weights that are on the device all the time, each once."""
    return sum(
        size
        for model in models
        for name, size in stages[model.name].weight_bytes().items()
        if name not in (*model.offload, *stages[model.name].borrowed)
    )


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
    """What accelerations and features may touch: the components that this process holds, but for another model's."""
    components = stage.own_components
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
