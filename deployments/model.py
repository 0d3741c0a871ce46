"""What is served: the arguments that every stage of an application shares."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from deployments.adapters.args import Adapter, AdapterCacheArgs
from deployments.memory.args import Offload, VAEArgs
from deployments.ranks.args import ParallelArgs

Order = Literal["slack", "fifo"]
Merging = Literal["auto", "always"]
GuidancePasses = Literal["apart", "together", "auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ComponentDType = Literal["float32", "bfloat16", "float16"]
CompileMode = Literal["off", "regional", "whole"]


def off_of_yaml(value: Any) -> Any:
    """YAML reads `off` as false; as a mode, and as that of a component."""
    if isinstance(value, dict):
        return {name: off_of_yaml(mode) for name, mode in value.items()}
    return "off" if value is False else value


# One mode for all denoisers, or one for each that is named; the others are off.
Compile = Annotated[CompileMode | dict[str, CompileMode], BeforeValidator(off_of_yaml)]
WarmUp = tuple[dict[str, JsonValue], ...]


Scheme = Literal["bf16", "fp16", "fp32", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "nf4", "layerwise"]
GGUF_SUFFIX = ".gguf"


def check_precision(given: str | dict[str, str]) -> str | dict[str, str]:
    """Raises ValueError for a word that is no scheme and no address of a GGUF file."""
    for place, word in given.items() if isinstance(given, dict) else [("", given)]:
        if word not in get_args(Scheme) and not word.endswith(GGUF_SUFFIX):
            raise ValueError(
                f"{place and f'{place}: '}{word!r} must be one of {', '.join(get_args(Scheme))}, or the address of a "
                ".gguf file: a path, s3://bucket/key or owner/repository/file"
            )
    return given


Precision = Annotated[str | dict[str, str], AfterValidator(check_precision)]


class DenoisingArgs(BaseModel):
    """How the step engine of a denoiser shares the device among requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: int = Field(
        8, ge=1, description="forwards that may be merged: one of each request, or all its passes"
    )
    max_batch_tokens: int | None = Field(None, ge=1, description="latent positions of a merged forward; null: no bound")
    max_wait_s: float = Field(
        0.01, ge=0, le=1, description="longest that a forward waits while new requests are prepared to join it, seconds"
    )
    merging: Merging = Field(
        "auto",
        description="auto: forwards share a batch where that was measured to let requests be done sooner; "
        "always: wherever they can",
    )
    guidance_passes: GuidancePasses = Field(
        "apart",
        description="the guidance passes that a pipeline makes one after the other in a step; apart: as it does, with "
        "its own bytes; together: in one batch wherever that is right; auto: where that was measured to cost less",
    )
    order: Order = Field(
        "slack",
        description="slack: the earliest deadline first, that of a request without `deadline_s` being three times its "
        "own duration; fifo: first come, first served",
    )
    deterministic: bool = Field(False, description="every forward runs alone: same seed, same bytes under any load")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; null: as few as cost less than 1 % of the time"
    )
    max_checkpoint_cache_bytes: int | None = Field(
        128 * 1024**2,
        ge=0,
        description="of what Cache-DiT keeps for a request, in its checkpoints; more is left out: a resumed request "
        "warms up again and says so, a deterministic one starts again; null: no bound",
    )

    @model_validator(mode="after")
    def check_that_passes_may_be_together(self) -> Self:
        """Raises ValueError."""
        if self.deterministic and self.guidance_passes != "apart":
            raise ValueError(
                f"guidance_passes: {self.guidance_passes} is of no effect with deterministic, whose forwards run "
                "alone: apart is allowed"
            )
        return self


class WatchdogArgs(BaseModel):
    """After how long what does not end is taken to hang: its process is replaced, and its work done again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward_timeout_s: float | None = Field(
        600, gt=0, description="a forward, an encoding or a decoding, seconds; null: no limit"
    )
    first_forward_timeout_s: float | None = Field(
        3600, gt=0, description="the same for the first of its kind and size, which may compile; null: no limit"
    )
    times_usual: float | None = Field(
        20,
        gt=1,
        description="a forward, an encoding or a decoding that takes so many times as long as those of its kind "
        "and size usually do is taken to hang too; null: only by the limits above",
    )
    usual_timeout_s: float = Field(60, gt=0, description="that it is given at least before it is, seconds")
    file_timeout_s: float | None = Field(
        600, gt=0, description="the writing of one picture or video, seconds; null: no limit"
    )


def check_inside(path: str) -> str:
    """Raises ValueError for a path that leads out of the folder that it is relative to."""
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or ".." in parts:
        raise ValueError(f"{path!r} must be a path inside the folder or repository, without '..'")
    return "/".join(part for part in parts if part not in ("", "."))


PathInside = Annotated[str, AfterValidator(check_inside)]


class PartArgs(BaseModel):
    """A component that is taken from elsewhere than the checkpoint's own folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="a folder, s3://bucket/prefix, or a repository of the Hugging Face hub")
    subfolder: PathInside = Field("", description="where the component's own files are in it; empty: at its top")


def part_of(value: Any) -> Any:
    """A path alone is a part at its top."""
    return {"path": value} if isinstance(value, str) else value


Part = Annotated[PartArgs, BeforeValidator(part_of)]


class IPAdapterArgs(BaseModel):
    """IP-Adapters, as the pipeline's own `load_ip_adapter` takes them: one, or several in a list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="a folder, s3://bucket/prefix, or a repository of the Hugging Face hub")
    subfolder: PathInside = Field("", description="where its weight files are in it")
    weight_name: str | tuple[str, ...] = Field(
        description="the weight file, such as ip-adapter_sd15.safetensors; several: a list"
    )
    image_encoder: Part | None = Field(
        None,
        description="the model that reads the picture, where it is not at `image_encoder` beside the weights",
    )
    scale: float | tuple[float, ...] | None = Field(
        None, description="how much the picture counts, for each weight file; null: 1 for all"
    )

    @property
    def weight_names(self) -> tuple[str, ...]:
        return (self.weight_name,) if isinstance(self.weight_name, str) else self.weight_name

    @property
    def scales(self) -> tuple[float, ...] | None:
        return (self.scale,) * len(self.weight_names) if isinstance(self.scale, float | int) else self.scale

    @property
    def reader(self) -> PartArgs:
        """The image encoder, by the rule of `load_ip_adapter`: a folder beside the weights."""
        beside = "/".join(part for part in (self.subfolder, "image_encoder") if part)
        return self.image_encoder or PartArgs(path=self.path, subfolder=beside)

    @model_validator(mode="after")
    def check_files(self) -> Self:
        """Raises ValueError."""
        if not self.weight_names:
            raise ValueError("weight_name names no file")
        for name in self.weight_names:
            if check_inside(name) != name or not name.endswith((".safetensors", ".bin")):
                raise ValueError(f"weight_name: {name!r} must be the name of a .safetensors or .bin file")
        if self.scales is not None and len(self.scales) != len(self.weight_names):
            raise ValueError(f"scale has {len(self.scales)} numbers for {len(self.weight_names)} files of weight_name")
        return self


class ComponentsArgs(BaseModel):
    """Components in place of the checkpoint's own or beside them, by the name of the pipeline's argument.

    Each is a part, a list of parts where the pipeline takes several (ControlNets), or null: the pipeline goes without.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Part | tuple[Part, ...] | None]

    ip_adapter: IPAdapterArgs | None = Field(None, description="IP-Adapters, which let a picture guide the denoiser")

    @model_validator(mode="after")
    def check_names(self) -> Self:
        """Raises ValueError."""
        for name, given in self.parts.items():
            if not name.isidentifier() or name.startswith("_"):
                raise ValueError(f"{name!r} cannot be the name of a component")
            if given == ():
                raise ValueError(f"{name}: the list is empty; null leaves an optional component out")
        return self

    @property
    def parts(self) -> dict[str, tuple[PartArgs, ...] | None]:
        """By component; None: left out."""
        given = self.__pydantic_extra__ or {}
        return {name: (part,) if isinstance(part, PartArgs) else part for name, part in given.items()}


# What every stage computes with, or hands to the next. The denoisers have a fingerprint of their own beside it.
OF_MAKING = (
    "path", "variant", "config_folder", "pipeline_class", "components", "dtype", "component_dtypes", "precision", "vae",
)  # fmt: skip


class ModelArgs(BaseModel):
    """The checkpoint and how its weights are held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="a checkpoint folder, s3://bucket/prefix, or a model id of the Hugging Face hub")
    name: str = Field(description="the name that callers use")
    dtype: DType = Field("auto", description="the dtype of the weights; auto: as stored in the checkpoint")
    component_dtypes: dict[str, ComponentDType] = Field(
        default_factory=dict, description="exceptions to `dtype` by component, such as `vae: float32`"
    )
    precision: Precision | None = Field(
        None, description="how the weights of the denoisers are held, or of each component; null: in the dtype"
    )
    variant: str | None = Field(
        None, description="which variant of the weight files to read, such as `fp16`, where there are several"
    )
    config_folder: str | None = Field(
        None, description="the folder with settings and tokenizers, where `path` is a single .safetensors file"
    )
    components: ComponentsArgs = Field(
        default_factory=ComponentsArgs, description="components in place of the checkpoint's own or beside them"
    )
    pipeline_class: str | None = Field(
        None, description="the pipeline of diffusers that is made of the components, where it is not the checkpoint's"
    )
    default_arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
    quality: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, description="levels of OpenAI's `quality` and the arguments of each"
    )
    denoising: DenoisingArgs = Field(default_factory=DenoisingArgs, description="the step engine")
    watchdog: WatchdogArgs = Field(default_factory=WatchdogArgs, description="when work is taken to hang")
    compile: Compile = Field("off", description="what of the denoisers torch.compile compiles")
    warm_up: WarmUp = Field((), description="arguments of requests that a replica makes before it takes any")
    fence_device_memory: bool = Field(False, description="a replica takes no more memory than its share of the device")
    vae: VAEArgs = Field(default_factory=VAEArgs, description="how autoencoders are held and called")
    offload: dict[str, Offload] = Field(
        default_factory=dict, description="components whose weights are on the host while they are not used"
    )
    parallel: ParallelArgs | None = Field(None, description="the ranks that compute the denoisers; null: one device")
    adapters: dict[str, Adapter] = Field(default_factory=dict, description="LoRAs that requests may name")
    takes_new_adapters: bool = Field(False, description="more of them may be added while it runs")
    adapter_cache: AdapterCacheArgs = Field(
        default_factory=AdapterCacheArgs, description="how many adapters a process keeps"
    )

    @property
    def version(self) -> str:
        """Equal for equal arguments."""
        return digest_of(self.model_dump_json())

    @property
    def making(self) -> str:
        """Equal where one replica may go on with what another has made of a request."""
        return digest_of(self.model_dump_json(include=set(OF_MAKING), exclude={"vae": {"parallel"}}))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
