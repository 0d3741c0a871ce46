"""Builds the application: the ingress bound to the stages of each model, from the `args:` of a Serve config file."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.serve import Application

from deployments.adapters.args import AdapterArgs, AdapterCacheArgs
from deployments.errors import CheckpointError
from deployments.memory.args import Offload, VAEArgs
from deployments.model import (
    GGUF_SUFFIX,
    Compile,
    ComponentDType,
    ComponentsArgs,
    DenoisingArgs,
    DType,
    ModelArgs,
    PartArgs,
    Precision,
    WarmUp,
    WatchdogArgs,
)
from deployments.ranks.args import ParallelArgs
from deployments.replicas.table import Bound, PlacedModel, SharedDeployment, bind_models, deployment_name
from env_config.closest import did_you_mean
from env_config.secret import PlainURL
from serve_app.adapters.places import HERE
from serve_app.ingress import Ingress, draining_s
from serve_app.models.args import ModelName, ServedModelArgs
from serve_app.models.shared import Share, check_shared, found_to_share, shared_named
from serve_app.own_versions import with_own_versions
from serve_app.service import ServiceArgs, refuse_at_the_top


class StageArgs(BaseModel):
    """The arguments of one model that its stages work by."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: PlainURL = Field(
        description="a folder, s3://bucket/prefix, a model id of the Hugging Face hub, or a .safetensors file"
    )
    dtype: DType = Field("auto", description="the dtype of the weights; auto: as stored in the checkpoint")
    component_dtypes: dict[str, ComponentDType] = Field(
        default_factory=dict, description="exceptions to `dtype` by component, such as `vae: float32`"
    )
    precision: Precision | None = Field(
        None,
        description="how weights are held where not in the dtype: bf16, fp16, fp32, fp8, fp8_dynamic, int8, "
        "int8_dynamic, nf4, layerwise or the address of a .gguf file; for the denoisers, or `{transformer: fp8}`",
    )
    variant: str | None = Field(
        None,
        pattern=r"^[\w-]+$",
        description="the variant of the weight files, such as fp16; null: the plain files, or the only variant",
    )
    config_folder: str | None = Field(
        None,
        description="for a `model` that is a single .safetensors file: the folder with its settings and tokenizers",
    )
    components: ComponentsArgs = Field(
        default_factory=ComponentsArgs,
        description="components in place of the checkpoint's own or beside them, such as `controlnet: PATH`, "
        "`vae: PATH`, `ip_adapter: {path, subfolder, weight_name, image_encoder, scale}`; null: without it",
    )
    pipeline_class: str | None = Field(
        None,
        pattern=r"^[A-Za-z]\w*$",
        description="the pipeline of diffusers that is made of the components, such as FluxControlNetPipeline; "
        "null: the checkpoint's own, or the one that takes the components",
    )
    placement: Literal["three_stage", "two_stage", "one_stage"] = Field(
        "three_stage",
        description="three_stage: Encoder, Denoiser, VAE; two_stage: EncoderVAE, Denoiser; one_stage: Pipeline",
    )
    denoising: DenoisingArgs = Field(
        default_factory=DenoisingArgs, description="how the denoiser's step engine shares the device"
    )
    watchdog: WatchdogArgs = Field(
        default_factory=WatchdogArgs, description="after how long what does not end is taken to hang and is replaced"
    )
    compile: Compile = Field(
        "off",
        description="torch.compile of the denoisers: off; regional: their repeated blocks; whole: the whole forward. "
        "Or a mode for each that is named, such as `{transformer: regional}`",
    )
    warm_up: WarmUp = Field(
        (),
        description="requests that every replica makes before it takes any, each as arguments of the pipeline's call "
        "such as `{width: 1024, height: 1024, num_inference_steps: 4}`",
    )
    adapter_cache: AdapterCacheArgs = Field(
        default_factory=AdapterCacheArgs,
        description="bytes of LoRAs that a process keeps on its device, on its host and on its disk",
    )
    fence_device_memory: bool = Field(
        False,
        description="a replica with num_gpus below 1 takes at most that share of its GPU's memory; false: num_gpus is "
        "only what Ray reserves",
    )
    vae: VAEArgs = Field(
        default_factory=VAEArgs,
        description="how autoencoders are held and called: tiling, slicing, dtype, memory format",
    )
    offload: dict[str, Offload] = Field(
        default_factory=dict,
        description="components whose weights are on the host while they are not used, such as "
        "`text_encoder_2: model` or `transformer: {kind: group, level: block}`",
    )
    parallel: ParallelArgs | None = Field(
        None,
        description="a replica of the denoiser is a group of ranks, one on each device, which make every forward "
        "together, such as `{ulysses: 2}`, `{batch: 2}` or `{ulysses: 2, batch: 2}`; null: one device",
    )
    verify: bool = Field(
        False,
        description="hold the split against the unsplit pipeline before a denoiser starts; on a mismatch it does not",
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_closest_key(cls, values: Any) -> Any:
        """Raises ValueError for an unknown key, with the known key that is closest to it."""
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    hint = did_you_mean(key, cls.model_fields, f"known: {', '.join(cls.model_fields)}")
                    raise ValueError(f"unknown argument {key!r}: {hint}")
        return values

    @model_validator(mode="after")
    def check_that_a_process_has_one_group_of_ranks(self) -> Self:
        """Raises ValueError."""
        if self.placement == "one_stage" and self.parallel is not None and self.vae.parallel is not None:
            raise ValueError(
                "parallel and vae.parallel are two groups of ranks, and with placement: one_stage there is one process "
                "for both: leave one of them out; two_stage and three_stage are allowed"
            )
        return self

    @model_validator(mode="after")
    def check_that_compiling_has_an_effect(self) -> Self:
        """Raises ValueError."""
        modes = self.compile.values() if isinstance(self.compile, dict) else (self.compile,)
        if self.denoising.deterministic and any(mode != "off" for mode in modes):
            raise ValueError("compile is of no effect with denoising.deterministic, whose forwards are never compiled")
        return self


class ModelEntry(ServedModelArgs, StageArgs):
    """One of several models: what its stages and the ingress are told of it."""


class AppArgs(ServiceArgs, StageArgs):
    """What is served: one model, or several. How the processes run is told by environment variables (env_config)."""

    model: PlainURL | None = Field(  # type: ignore[assignment]
        None, description=f"{StageArgs.model_fields['model'].description}; or give several in `models`"
    )
    models: dict[ModelName, ModelEntry] = Field(
        default_factory=dict, description=ServiceArgs.model_fields["models"].description
    )
    share: Share = Field(
        "off",
        description="deployments whose replicas do their stage for several of `models`, with what is equal of their "
        "weights once: a list of names such as Encoder-flux+chroma; auto: those with something in common; off",
    )

    @model_validator(mode="after")
    def check_that_it_has_models(self) -> Self:
        """Raises ValueError."""
        if self.models:
            refuse_at_the_top(self.model_fields_set, StageArgs.model_fields)
        elif self.model is None:
            raise ValueError("model is required, or several models in `models`")
        return self

    @model_validator(mode="after")
    def check_what_is_shared(self) -> Self:
        """Raises ValueError."""
        if self.share != "off" and not self.models:
            raise ValueError("share is for `models`: one model alone has nobody to share with")
        if isinstance(self.share, tuple):
            check_shared(self.share, self.models, PLACEMENTS)
        return self

    @model_validator(mode="after")
    def check_that_a_certificate_has_its_key(self) -> Self:
        """Raises ValueError."""
        if (self.c2pa_certificate is None) != (self.c2pa_private_key is None):
            raise ValueError("c2pa_certificate and c2pa_private_key are needed both, or neither")
        return self

    @property
    def entries(self) -> dict[str, ModelEntry]:
        """The models by the names that callers use; the one of `model` is called by the last part of its address."""
        if self.model is None:
            return dict(self.models)
        name = self.model_name or Path(self.model.rstrip("/")).name.removesuffix(".safetensors")
        return {name: ModelEntry(**{field: getattr(self, field) for field in ModelEntry.model_fields})}

    def entry(self, name: str | None = None) -> tuple[str, ModelEntry]:
        """The model of this name, or the only one. Raises ValueError that lists what is there."""
        entries = self.entries
        if name is None and len(entries) == 1:
            return next(iter(entries.items()))
        if name not in entries:
            raise ValueError(
                f"{'name one of the models' if name is None else repr(name)}: there are {', '.join(entries)}"
            )
        return name, entries[name]


def build_app(args: AppArgs) -> Application:
    """The application that `import_path: serve_app.app:build_app` names."""
    service = service_args(args)
    models = [placed_model(args, name) for name in args.entries]
    versions = {placed.model.name: placed.model.version for placed in models}
    stages = bind_models(models, shared_deployments(args))
    return ingress_before(stages, service, versions)


def ingress_before(stages: Mapping[str, Bound], service: ServiceArgs, versions: Mapping[str, str]) -> Application:
    """The ingress of these models' encoders, denoisers and VAEs, with the versions of their arguments."""
    ingress = Ingress.options(graceful_shutdown_timeout_s=draining_s(service)).bind(service, stages, versions)
    return with_own_versions(ingress)


def placed_model(args: AppArgs, name: str) -> PlacedModel:
    """One model and where its stages run; the deployments of one of several are named after it."""
    entry = args.entries[name]
    named_after = name if args.models else None
    return PlacedModel(model_args(args, name), PLACEMENTS[entry.placement], entry.verify, named_after)


def shared_deployments(args: AppArgs) -> tuple[SharedDeployment, ...]:
    """Raises ValueError where `auto` cannot tell."""
    if args.share == "auto":
        models = {name: model_args(args, name) for name in args.models}
        try:
            return found_to_share(models, {name: PLACEMENTS[entry.placement] for name, entry in args.models.items()})
        except CheckpointError as error:
            raise ValueError(f"share: auto cannot tell: {error}") from error
    return tuple(map(shared_named, args.share)) if isinstance(args.share, tuple) else ()


def deployments_of(args: AppArgs, name: str, shared: Sequence[SharedDeployment] | None = None) -> dict[str, str]:
    """The deployments of one model as the config names them, each with its name in REPLICAS.

    `shared`: `shared_deployments(args)`, where they are known already.
    """
    named_after = name if args.models else None
    shared = shared_deployments(args) if shared is None else shared
    of_several = {each.kind: each.name for each in shared if name in each.models}
    kinds = PLACEMENTS[args.entries[name].placement]
    return {of_several.get(kind, deployment_name(kind, named_after)): kind for kind in kinds}


def ranks_of(args: AppArgs, name: str) -> dict[str, tuple[str, int]]:
    """The deployments of one model as the config names them: what asks for ranks there (nothing for encoders), and how
    many processes a replica is."""
    entry = args.entries[name]
    encoder, denoiser, vae = PLACEMENTS[entry.placement]
    found = {encoder: ("", 1)}
    found[vae] = "vae.parallel", entry.vae.parallel.ranks if entry.vae.parallel else 1
    if entry.parallel is not None or denoiser != vae:
        found[denoiser] = "parallel", entry.parallel.size if entry.parallel else 1
    return {deployment_name(kind, name if args.models else None): ranks for kind, ranks in found.items()}


def service_args(args: AppArgs) -> ServiceArgs:
    """What the ingress is told: of one model as of several."""
    of_models = {"model_name", "model_aliases", "models", "aliases", *ServedModelArgs.model_fields}
    common = {name: getattr(args, name) for name in ServiceArgs.model_fields if name not in of_models}
    names = {alias: name or next(iter(args.entries)) for alias, name in args.names.items()}
    models = {name: served_args(entry) for name, entry in args.entries.items()}
    places = tuple(map(located_place, args.adapter_places))
    return ServiceArgs(**common | {"models": models, "aliases": names, "adapter_places": places})


def served_args(entry: ModelEntry) -> ServedModelArgs:
    """What the ingress is told of one model."""
    given = {name: getattr(entry, name) for name in ServedModelArgs.model_fields}
    return ServedModelArgs(**given | {"adapters": located_adapters(entry)})


def model_args(args: AppArgs, name: str | None = None) -> ModelArgs:
    """What every stage is told of the model of this name, or of the only one. Raises ValueError."""
    name, entry = args.entry(name)
    return ModelArgs(
        path=locate(entry.model),
        name=name,
        dtype=entry.dtype,
        component_dtypes=entry.component_dtypes,
        precision=with_absolute_files(entry.precision),
        variant=entry.variant,
        config_folder=None if entry.config_folder is None else locate(entry.config_folder),
        components=located(entry.components),
        pipeline_class=entry.pipeline_class,
        default_arguments=entry.default_arguments,
        quality=entry.quality,
        denoising=entry.denoising,
        watchdog=entry.watchdog,
        compile=entry.compile,
        adapter_cache=entry.adapter_cache,
        warm_up=entry.warm_up,
        fence_device_memory=entry.fence_device_memory,
        vae=entry.vae,
        offload=entry.offload,
        parallel=entry.parallel,
        adapters=located_adapters(entry),
        takes_new_adapters=bool(args.adapter_places),
    )


def located_adapters(entry: ModelEntry) -> dict[str, AdapterArgs]:
    """With absolute paths of those that are here."""
    return {name: located_adapter(each) for name, each in entry.adapters.items()}


PIPELINE_INDEXES = ("model_index.json", "modular_model_index.json")


def located(components: ComponentsArgs) -> ComponentsArgs:
    """With absolute paths of the folders that are here."""

    def part(given: PartArgs) -> PartArgs:
        return given.model_copy(update={"path": locate(given.path, (given.subfolder,))})

    adapter = components.ip_adapter
    if adapter is not None:
        reader = adapter.image_encoder and part(adapter.image_encoder)
        adapter = adapter.model_copy(
            update={"path": locate(adapter.path, (adapter.subfolder,)), "image_encoder": reader}
        )
    parts = {name: given and tuple(map(part, given)) for name, given in components.parts.items()}
    return ComponentsArgs(ip_adapter=adapter, **parts)


def located_adapter(adapter: AdapterArgs) -> AdapterArgs:
    """With the absolute path of a file or folder that is here."""
    return adapter.model_copy(update={"path": locate(adapter.path, (adapter.weight_name or "",))})


def located_place(place: str) -> str:
    """With the absolute path of ./folder, where it is here."""
    return locate(place, ("",)) if place.startswith(HERE) else place


def with_absolute_files(precision: Precision | None) -> Precision | None:
    """With absolute paths of the GGUF files that are here."""
    if precision is None or isinstance(precision, dict):
        return precision and {name: str(with_absolute_files(each)) for name, each in precision.items()}
    return locate(precision) if precision.endswith(GGUF_SUFFIX) else precision


def locate(path: str, inside: tuple[str, ...] = PIPELINE_INDEXES) -> str:
    """A relative folder that has one of these in it (or a single file) is looked for where the command runs, then
    beside this package."""
    for base in (Path.cwd(), Path(__file__).parents[1]):
        with contextlib.suppress(OSError, ValueError):  # not to be looked into, no path: the stages say what is wrong
            is_folder = any((base / path / name).exists() for name in inside)
            if is_folder or (base / path).is_file():
                return str((base / path).resolve())
    return path


# The deployments that run the encoder, the denoiser and the VAE: names of deployments.replicas.table.
PLACEMENTS: dict[str, tuple[str, str, str]] = {
    "three_stage": ("Encoder", "Denoiser", "VAE"),
    "two_stage": ("EncoderVAE", "Denoiser", "EncoderVAE"),
    "one_stage": ("Pipeline", "Pipeline", "Pipeline"),
}
