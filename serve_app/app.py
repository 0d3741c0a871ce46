"""Builds the application: the ingress bound to the stages, from the `args:` of a Serve config file."""

import contextlib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from ray.serve import Application

from deployments.adapters.args import AdapterCacheArgs
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
from deployments.replicas.table import bind_stages
from env_config.closest import did_you_mean
from env_config.secret import PlainURL
from serve_app.ingress import Ingress, draining_s
from serve_app.service import ServiceArgs


class AppArgs(ServiceArgs):
    """What is served. How the processes run is told by environment variables (env_config)."""

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
    def check_that_compiling_has_an_effect(self) -> Self:
        """Raises ValueError."""
        modes = self.compile.values() if isinstance(self.compile, dict) else (self.compile,)
        if self.denoising.deterministic and any(mode != "off" for mode in modes):
            raise ValueError("compile is of no effect with denoising.deterministic, whose forwards are never compiled")
        return self

    @model_validator(mode="after")
    def check_that_a_certificate_has_its_key(self) -> Self:
        """Raises ValueError."""
        if (self.c2pa_certificate is None) != (self.c2pa_private_key is None):
            raise ValueError("c2pa_certificate and c2pa_private_key are needed both, or neither")
        return self


def build_app(args: AppArgs) -> Application:
    """The application that `import_path: serve_app.app:build_app` names."""
    model = model_args(args)
    service = ServiceArgs(
        **{name: getattr(args, name) for name in ServiceArgs.model_fields} | {"model_name": model.name}
    )
    ingress = Ingress.options(graceful_shutdown_timeout_s=draining_s(service))
    return ingress.bind(service, *bind_stages(model, PLACEMENTS[args.placement], verify=args.verify))


def model_args(args: AppArgs) -> ModelArgs:
    """What every stage is told of the model."""
    return ModelArgs(
        path=locate(args.model),
        name=args.model_name or Path(args.model.rstrip("/")).name.removesuffix(".safetensors"),
        dtype=args.dtype,
        component_dtypes=args.component_dtypes,
        precision=with_absolute_files(args.precision),
        variant=args.variant,
        config_folder=None if args.config_folder is None else locate(args.config_folder),
        components=located(args.components),
        pipeline_class=args.pipeline_class,
        default_arguments=args.default_arguments,
        quality=args.quality,
        denoising=args.denoising,
        watchdog=args.watchdog,
        compile=args.compile,
        adapter_cache=args.adapter_cache,
        warm_up=args.warm_up,
        fence_device_memory=args.fence_device_memory,
        vae=args.vae,
        offload=args.offload,
    )


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
