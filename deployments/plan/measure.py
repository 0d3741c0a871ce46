"""Measures a checkpoint without its weights: sizes from configurations and headers, activations from a walk on meta."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

from deployments.errors import CheckpointError, TriptychError
from deployments.messages import STAGES, StageDescription
from deployments.model import ComponentsArgs, ModelArgs
from deployments.plan.headers import Stored, read_stored
from deployments.plan.measured import Call, Component, Measured, Scheme
from deployments.plan.process import MeasureOrder
from deployments.plan.session import WalkSession
from deployments.plan.split import tensor_bytes, ways_of
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stage_pipeline.roles import PipelineLayout, read_layout
from deployments.stage_pipeline.skeleton import skeleton
from deployments.stages.encode import call_arguments
from deployments.verify.asked import Asked
from deployments.verify.request import in_words, small_requests
from deployments.weights.containers import is_container, member_folders
from deployments.weights.load import FLOATING, is_quantised, library_of, stored_dtype
from deployments.weights.locate import resolve_checkpoint
from deployments.weights.parts.compose import resolve_model
from env_config.variables import EnvConfig

STEPS = 6  # of the walk: Wan2.2's second denoiser makes the later ones
PLAIN_SIDE = 1024  # pixels, where nothing says another size
LONG_PROMPT = " ".join(["a small red boat on a quiet lake"] * 100)  # as many tokens as encoders take
CPU = torch.device("cpu")

# Bytes for each weight of a linear layer, and for each of its rows: (float32 scales of rows; float32 of 64 weights; the
# blocks of GGUF's Q8_0 and Q4_K, which hold 32 weights in 34 bytes and 256 in 144).
LINEAR: dict[Scheme, tuple[float, int]] = {
    "fp8": (1, 4),
    "fp8_dynamic": (1, 4),
    "int8": (1, 4),
    "int8_dynamic": (1, 4),
    "nf4": (0.5 + 4 / 64, 0),
    "layerwise": (1, 0),
    "gguf_q8": (34 / 32, 0),
    "gguf_q4": (144 / 256, 0),
}
FLOATS: dict[Scheme, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
HALF = 2  # bytes


def measure(order: MeasureOrder, env: EnvConfig) -> Measured:
    """Raises CheckpointError for a model whose configuration cannot be had or read."""
    notes: list[str] = []
    model = without_adapters(order.model, notes)
    folder = settings_of(model, env)
    layout = read_layout(folder)
    stored = read_headers(layout, model.variant, notes)
    stage = walkable(layout, model, stored, notes)
    components = tuple(sized(name, stage, stored.get(name)) for name in layout.models)
    notes += disagreements(components)
    description = describe_stage(stage)
    width, height, num_frames = size_asked(order, model, description)
    measured = Measured(
        model.path, type(stage.pipeline).__name__, {}, width, height, num_frames, components, notes=tuple(notes)
    )
    return walked(stage, model, measured, description)


def without_adapters(model: ModelArgs, notes: list[str]) -> ModelArgs:
    """IP-Adapters are put into a model's layers from files whose sizes no configuration tells."""
    if model.components.ip_adapter is None:
        return model
    notes.append("The weights of the IP-Adapters and of their image encoder are not counted.")
    parts = {name: value for name, value in model.components if name != "ip_adapter"}
    return model.model_copy(update={"components": ComponentsArgs(**parts)})


def settings_of(model: ModelArgs, env: EnvConfig) -> Path:
    """The local folder with configurations and tokenizers; weights stay where they are. Raises CheckpointError."""
    cache_root = env.runtime.cache_root
    if model.components.parts or model.pipeline_class:
        return resolve_model(model, cache_root, (), use_streamer=True)
    return resolve_checkpoint(model.path, cache_root, (), True, model.variant, model.config_folder)


def read_headers(layout: PipelineLayout, variant: str | None, notes: list[str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    problems: dict[str, CheckpointError] = {}
    for name, cls in layout.models.items():
        folder = layout.folder / name
        try:
            parts = [
                read_stored(each, library_of(cls).files, variant)
                for each in (member_folders(folder) if is_container(cls) else [folder])
            ]
            elements: dict[str, int] = {}
            for part in parts:
                elements |= {dtype: elements.get(dtype, 0) + n for dtype, n in part.elements.items()}
            found[name] = Stored(sum(part.num_bytes for part in parts), elements)
        except CheckpointError as error:
            problems[name] = error
    if problems:
        first = next(iter(problems.values()))
        notes.append(f"Counted from the configuration alone, without files: {', '.join(problems)} ({first}).")
    return found


def walkable(layout: PipelineLayout, model: ModelArgs, stored: Mapping[str, Stored], notes: list[str]) -> StagePipeline:
    """The pipeline of skeletons alone. Raises CheckpointError."""
    dtypes: dict[str, torch.dtype] = {}
    guessed = []
    for name, cls in layout.models.items():
        named = model.component_dtypes.get(name) or (None if model.dtype == "auto" else model.dtype)
        in_files = FLOATING.get(stored[name].dtype or "") if name in stored else None
        known = getattr(torch, named) if named else in_files or stored_dtype(cls, layout.folder / name, model.variant)
        if known is None:
            guessed.append(name)
        dtypes[name] = known or torch.bfloat16
    if guessed:
        notes.append(f"The dtype that {', '.join(guessed)} is stored in is not known: bfloat16 was taken.")
    held = {}
    for name, cls in layout.models.items():
        held[name] = skeleton(cls, layout.folder / name, CPU, dtypes[name], read_buffers=False)
        if callable(getattr(held[name], "tie_weights", None)):
            held[name].tie_weights()  # the constructor's own ties end where each parameter is moved to meta
    return load_stage(layout.folder, (), CPU, torch.bfloat16, held=held)


# --- sizes -----------------------------------------------------------------------------------------------------------


def sized(name: str, stage: StagePipeline, stored: Stored | None) -> Component:
    module, layout = getattr(stage.pipeline, name), stage.layout
    quantised = is_quantised(layout.folder / name)
    loaded = bytes_of(module)
    ways = ways_of(module) if name in layout.denoisers else {}
    if quantised and stored is not None:
        loaded = stored.num_bytes
    return Component(
        name=name,
        class_name=layout.models[name].__name__,
        stages=tuple(each for each in STAGES if each in layout.stages_of[name]),
        dtype=str(most_of(module)).removeprefix("torch."),
        loaded=loaded,
        weights={} if quantised else {scheme: weight_bytes(module, scheme) for scheme in (*FLOATS, *LINEAR)},
        largest_layer=max((HALF * each.weight.numel() for each in linear_layers(module)), default=0),
        largest_block=max((bytes_of(block) for block in blocks(module)), default=0),
        outside_blocks=bytes_of(module) - bytes_in(blocks(module)),
        halves={
            half: bytes_of(child)
            for half in ("encoder", "decoder")
            if name in layout.autoencoders and isinstance(child := getattr(module, half, None), torch.nn.Module)
        },
        stored=stored.num_bytes if stored else None,
        stored_dtype=stored.dtype if stored else None,
        is_quantised=quantised,
        ways=ways,
        tensor_bytes=tensor_bytes(module) if "tensor" in ways else 0,
    )


def bytes_of(module: torch.nn.Module) -> int:
    return bytes_in([module])


def bytes_in(modules: Iterable[torch.nn.Module]) -> int:
    tensors = {key: tensor for module in modules for key, tensor in tensors_of(module).items()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tensors_of(module: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Each once, however many layers share it."""
    return {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}


def most_of(module: torch.nn.Module) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors_of(module).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def linear_layers(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [each for each in module.modules() if isinstance(each, torch.nn.Linear)]


def blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What repeats: the children of lists of modules."""
    for each in module.modules():
        if isinstance(each, torch.nn.ModuleList):
            yield from (block for block in each if isinstance(block, torch.nn.Module))


def weight_bytes(module: torch.nn.Module, scheme: Scheme) -> int:
    """Of the module in that precision: the weights of linear layers as it packs them, all else in the plain dtype."""
    plain = FLOATS.get(scheme, HALF)
    usual = most_of(module)
    packed = packed_weights(module, scheme)
    total = 0.0
    for key, tensor in tensors_of(module).items():
        if key in packed:
            each, row = LINEAR[scheme]
            total += tensor.numel() * each + tensor.shape[0] * row
        elif not tensor.is_floating_point():
            total += tensor.numel() * tensor.element_size()
        else:  # what a model keeps in float32 stays so
            kept = tensor.dtype == torch.float32 and usual != torch.float32
            total += tensor.numel() * (4 if kept else plain)
    return round(total)


def packed_weights(module: torch.nn.Module, scheme: Scheme) -> set[int]:
    if scheme not in LINEAR:
        return set()
    skipped: tuple[str, ...] = ()
    if scheme == "layerwise":
        own = getattr(module, "_skip_layerwise_casting_patterns", None) or ()
        skipped = (*DEFAULT_SKIP_MODULES_PATTERN, *own)
    return {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(re.search(pattern, name) for pattern in skipped)
    }


def disagreements(components: tuple[Component, ...]) -> Iterator[str]:
    """Files that are not what the configuration says would be refused when they are loaded."""
    for each in components:
        expected = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(each.stored_dtype or "")
        if each.stored is None or each.is_quantised or expected is None:
            continue
        counted = each.weights[expected]  # type: ignore[index]
        if abs(each.stored - counted) > 0.05 * counted:
            yield (
                f"The files of {each.name} hold {each.stored / 1e9:.2f} GB, its configuration makes a model of "
                f"{counted / 1e9:.2f} GB of the same dtype."
            )


# --- the walk --------------------------------------------------------------------------------------------------------


def size_asked(order: MeasureOrder, model: ModelArgs, description: StageDescription) -> tuple[int, int, int]:
    """Width and height in pixels, frames: as asked, by the defaults of the args, the pipeline's own."""

    def first(name: str, asked: int | None, own: int | None, otherwise: int) -> int:
        known = (asked, model.default_arguments.get(name), description.parameters.get(name), own)
        return next((value for value in known if isinstance(value, int)), otherwise)

    width = first("width", order.width, description.default_width, PLAIN_SIDE)
    height = first("height", order.height, description.default_height, PLAIN_SIDE)
    return width, height, first("num_frames", order.num_frames, None, 1)


def walked(stage: StagePipeline, model: ModelArgs, measured: Measured, description: StageDescription) -> Measured:
    """With the calls that a request of the size makes; with a note where the pipeline cannot be walked through."""
    frames = {"num_frames": measured.num_frames} if "num_frames" in description.parameters else {}
    errors: list[str] = []
    for prompt in (LONG_PROMPT, None):
        asked = Asked(width=measured.width, height=measured.height, steps=STEPS, arguments=dict(frames), prompt=prompt)
        if "prompt" not in description.parameters:
            asked = asked.model_copy(update={"prompt": None})
        try:
            for request in small_requests(stage, model, asked):
                try:
                    calls = WalkSession(stage, call_arguments(stage, request)).run()
                except Exception as error:  # noqa: BLE001  (it may want other inputs, or a shorter text)
                    errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
                    continue
                words = {name: word[:40] for name, word in in_words(request.arguments).items()}
                return replace(measured, request=words, calls=tuple(with_uncalled(calls, stage)))
        except TriptychError as error:
            errors.append(str(error))
    told = "; ".join(dict.fromkeys(errors))
    note = f"Activations are not counted, because the call could not be walked through: {told}."
    return replace(measured, notes=(*measured.notes, note))


def with_uncalled(calls: list[Call], stage: StagePipeline) -> Iterator[Call]:
    """A denoiser that made no step takes what another of its class takes."""
    yield from calls
    called = {call.component for call in calls}
    for name in stage.layout.denoisers:
        if name not in called:
            cls = stage.layout.models[name]
            yield from (
                replace(call, component=name) for call in calls if stage.layout.models.get(call.component) is cls
            )
