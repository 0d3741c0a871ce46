"""Loads the part of a pipeline that one process needs: real components for its stages, skeletons for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.memory.stage_memory import StageMemory
from deployments.messages import STAGES, StageName
from deployments.stage_pipeline.roles import PipelineLayout, denoising_models, read_layout
from deployments.stage_pipeline.skeleton import skeleton
from deployments.tensors.parts import num_bytes
from deployments.weights.complete import check_complete, check_tokenizers
from deployments.weights.containers import is_container, member_folders
from deployments.weights.load import is_quantised, library_of, load_component, stored_dtype, stored_variant
from deployments.weights.parts.ip_adapter import IMAGE_ENCODER, install_ip_adapters
from deployments.weights.precision.chosen import Asked, by_component, compute_dtype, plain_dtypes, precisions, ready
from deployments.weights.shared.pool import AskedComponent, ModelInPool
from deployments.weights.shared.same_files import Stored
from deployments.weights.vision import lack_of_torchvision

UNUSED_HALF = {
    "encoder": "decoder",
    "vae": "encoder",
}  # stage -> the half of an autoencoder that it does not run

HOST = torch.device("cpu")
COPIES = (
    "its constructor copies weights of one component into another, and these are in several processes: serve the "
    "folder that its save_pretrained writes, where that is done"
)


@dataclass(frozen=True)
class StagePipeline:
    """A pipeline in a process that runs some of its stages."""

    pipeline: Any  # DiffusionPipeline
    layout: PipelineLayout
    stages: tuple[StageName, ...]
    device: torch.device
    dtype: torch.dtype | None
    decoder_shapes: dict[Any, Any] = field(default_factory=dict)  # what decoder calls return, by input shapes
    memory: StageMemory = field(default_factory=StageMemory)  # of the device
    twins: dict[str, Any] = field(default_factory=dict)  # of real components, for the shapes of what they would return
    precisions: Mapping[str, str] = field(default_factory=dict)  # of components that are held in another than the dtype
    switches: dict[str, Any] = field(default_factory=dict)  # of components that are compiled, by name
    adapters: Any = None  # deployments.adapters.library.AdapterLibrary; None: a stage that only looks at the model
    handed_over: dict[str, Any] = field(default_factory=dict)  # what this process made and decodes itself, by token
    read_outputs: dict[Any, set[int]] = field(default_factory=dict)  # recorded ones that are needed, by kind of request
    shared: Mapping[str, str] = field(default_factory=dict)  # components that another model of this process has too
    borrowed: frozenset[str] = frozenset()  # those of them that the other model has loaded, and made ready
    unread_outputs: dict[Any, frozenset[int]] = field(default_factory=dict)  # those that are not, by its settings too
    quiet_calls: set[tuple[str, str]] = field(default_factory=set)  # decoder calls that draw no global random numbers

    def is_here(self, component: str) -> bool:
        """Whether this process holds the weights of the component (or the half of it that its stages run)."""
        return bool(self.layout.stages_of[component] & set(self.stages))

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The real components of this process by name."""
        found = {n: getattr(self.pipeline, n, None) for n in self.layout.models if self.is_here(n)}
        return {n: m for n, m in found.items() if isinstance(m, torch.nn.Module)}

    @property
    def own_components(self) -> dict[str, torch.nn.Module]:
        """Without those that another model of this process has loaded."""
        return {name: module for name, module in self.components.items() if name not in self.borrowed}

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of parameters and buffers that this process holds, by component."""
        return {name: _num_bytes(module) for name, module in self.components.items()}


def load_stage(
    folder: Path,
    stages: tuple[StageName, ...] = STAGES,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    use_streamer: bool = False,
    component_dtypes: Mapping[str, torch.dtype] | None = None,
    variant: str | None = None,
    held: Mapping[str, torch.nn.Module] | None = None,
    precision: Asked = None,
    on_host: Collection[str] = (),
    pool: ModelInPool | None = None,
) -> StagePipeline:
    """Raises CheckpointError for a folder that cannot be served; dtype None: each component's as it is stored.

    `use_streamer` reads the weights with the Run:ai model streamer; `component_dtypes` are exceptions to `dtype`;
    `variant` is that of the weight files, such as fp16; `held` are components that are here already; `precision` says
    how weights are held where not in the dtype, of the denoisers or by component; files that it names are here. The
    weights of those `on_host` are left in the host's memory. `pool` has the components of other models, which are taken
    where they are equal.
    """
    layout = read_layout(folder)
    check_complete(folder, layout.classes)
    refuse_unknown_variant(folder, layout, variant)
    device = torch.device(device)
    asked = by_component(precision, layout.models, denoising_models(layout.models))
    exceptions = dict(component_dtypes or {})
    exceptions |= plain_dtypes(asked, exceptions)
    chosen = precisions(asked)
    elsewhere = [name for name, each in chosen.items() if each.file]
    dtypes = dict.fromkeys(layout.models, dtype) if dtype else stored_dtypes(folder, layout, variant, elsewhere)
    dtypes |= image_encoder_dtype(layout, dtypes)
    dtypes |= exceptions
    if unknown := sorted(dtypes.keys() - layout.models.keys()):
        raise CheckpointError(f"component_dtypes names {', '.join(unknown)}; the models are {', '.join(layout.models)}")
    for name, each in chosen.items():
        dtypes[name] = compute_dtype(name, each, dtypes[name])

    def component(name: str, needed: Collection[StageName]) -> Any:
        cls, own, held_in = layout.models[name], folder / name, chosen.get(name)
        if held and name in held:
            return held[name]
        if not set(needed) & set(stages):
            return skeleton(cls, own, device, dtypes[name], variant)
        where, held_in = HOST if name in on_host else device, ready(name, held_in, cls, device) if held_in else None
        load = partial(load_component, cls, own, dtypes[name], where, use_streamer, variant, held_in)
        if pool is None or is_container(cls):
            return load()
        stored = Stored(own, library_of(cls).files, variant, held_in.file if held_in else None)
        asked = AskedComponent(
            name, cls, dtypes[name], held_in, name in layout.autoencoders, name in lora_places(layout.pipeline_class)
        )
        return pool.component(asked, stored, load)

    components = {name: component(name, needed) for name, needed in layout.stages_of.items()}
    try:
        pipeline: Any = layout.pipeline_class.from_pretrained(str(folder), local_files_only=True, **components)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        cause = COPIES if "meta tensor" in str(error) else lack_of_torchvision(folder, layout.classes) or str(error)
        raise CheckpointError(f"{layout.pipeline_class.__name__} in {folder} cannot be loaded: {cause}") from error
    check_tokenizers(pipeline, folder)
    if layout.ip_adapters is not None:
        install_ip_adapters(pipeline, layout.ip_adapters, folder)
    if pool is not None:
        pool.check_unchanged()
    pipeline.set_progress_bar_config(disable=True)
    says = {name: each.says(dtypes[name]) for name, each in chosen.items()}
    loaded = StagePipeline(pipeline, layout, stages, device, dtype, precisions=says)
    drop_unused_halves(loaded)
    return loaded


def lora_places(pipeline_class: Any) -> Collection[str]:
    """Components into which the loader of the class may put layers of LoRAs."""
    places: Collection[str] = getattr(pipeline_class, "_lora_loadable_modules", ())
    return places


def refuse_unknown_variant(folder: Path, layout: PipelineLayout, variant: str | None) -> None:
    """Raises CheckpointError for a variant that no component has; where files are elsewhere, it cannot be told."""
    if variant is None:
        return
    try:
        found = {stored_variant(model, folder / name, variant) for name, model in layout.models.items()}
    except CheckpointError:  # loading says what is wrong with those that are needed here
        return
    if variant not in found:
        raise CheckpointError(f"no weights in {folder} are of the variant {variant!r}: leave `variant:` out")


def stored_dtypes(
    folder: Path, layout: PipelineLayout, variant: str | None = None, without: Collection[str] = ()
) -> dict[str, torch.dtype | None]:
    """Of each component, None where its quantiser decides; where its files are not here, that of most of the others.

    `without` are components whose files are not read: another process may not have them.
    """
    quantised = [name for name in layout.models if is_quantised(folder / name)]
    models = {name: model for name, model in layout.models.items() if name not in (*quantised, *without)}
    found = {name: stored_dtype(model, folder / name, variant) for name, model in models.items()}
    known = Counter(dtype for dtype in found.values() if dtype is not None)
    usual = known.most_common(1)[0][0] if known else None
    of_others = dict.fromkeys(without, usual)
    return dict.fromkeys(layout.models) | of_others | {name: dtype or usual for name, dtype in found.items()}


def image_encoder_dtype(
    layout: PipelineLayout, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, torch.dtype | None]:
    """That of the image encoder that came with IP-Adapters: their loader's own default, or that of most others."""
    if layout.ip_adapters is None or not layout.ip_adapters.brings_image_encoder:
        return {}
    others = Counter(dtype for name, dtype in dtypes.items() if name != IMAGE_ENCODER and dtype is not None)
    named = layout.ip_adapters.image_encoder_dtype
    usual = others.most_common(1)[0][0] if others else None
    return {IMAGE_ENCODER: getattr(torch, named) if named else usual}


def weights_needed(folder: Path, stages: tuple[StageName, ...]) -> list[str]:
    """Components whose weight files a process of these stages reads.

    Skeletons need no weights, but for the statistics that autoencoders keep among theirs.
    """
    layout = read_layout(folder)
    names = [n for n, needed in layout.stages_of.items() if needed & set(stages) or n in layout.autoencoders]
    return [each.name for n in names for each in _folders(folder / n, layout.models[n])]


def _folders(folder: Path, cls: type[torch.nn.Module]) -> list[Path]:
    return member_folders(folder) if is_container(cls) else [folder]


def drop_unused_halves(loaded: StagePipeline) -> None:
    if len(loaded.stages) != 1 or loaded.stages[0] not in UNUSED_HALF:
        return
    for name in loaded.layout.autoencoders:
        half = getattr(getattr(loaded.pipeline, name, None), UNUSED_HALF[loaded.stages[0]], None)
        if isinstance(half, torch.nn.Module):
            half.to("meta")


def _num_bytes(module: torch.nn.Module) -> int:
    seen: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        seen |= num_bytes(tensor)
    return sum(seen.values())
