"""What is served: the arguments that every stage of an application shares."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Order = Literal["slack", "fifo"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ComponentDType = Literal["float32", "bfloat16", "float16"]


class DenoisingArgs(BaseModel):
    """How the step engine of a denoiser shares the device among requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: int = Field(8, ge=1, description="requests whose forwards may be merged")
    max_batch_tokens: int | None = Field(None, ge=1, description="latent positions of a merged forward; null: no bound")
    max_wait_s: float = Field(
        0.01, ge=0, le=1, description="longest that a forward waits while new requests are prepared to join it, seconds"
    )
    order: Order = Field("slack", description="slack: the least slack first; fifo: first come, first served")
    deterministic: bool = Field(False, description="every forward runs alone: same seed, same bytes under any load")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; null: as few as cost less than 1 % of the time"
    )


class WatchdogArgs(BaseModel):
    """After how long what does not end is taken to hang: its process is replaced, and its work done again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward_timeout_s: float | None = Field(
        600, gt=0, description="a forward, an encoding or a decoding, seconds; null: no limit"
    )
    first_forward_timeout_s: float | None = Field(
        3600, gt=0, description="the same for the first of its kind and size, which may compile; null: no limit"
    )
    file_timeout_s: float | None = Field(
        600, gt=0, description="the writing of one picture or video, seconds; null: no limit"
    )


class ModelArgs(BaseModel):
    """The checkpoint and how its weights are held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="a checkpoint folder, s3://bucket/prefix, or a model id of the Hugging Face hub")
    name: str = Field(description="the name that callers use")
    dtype: DType = Field("auto", description="the dtype of the weights; auto: as stored in the checkpoint")
    component_dtypes: dict[str, ComponentDType] = Field(
        default_factory=dict, description="exceptions to `dtype` by component, such as `vae: float32`"
    )
    variant: str | None = Field(
        None, description="which variant of the weight files to read, such as `fp16`, where there are several"
    )
    config_folder: str | None = Field(
        None, description="the folder with settings and tokenizers, where `path` is a single .safetensors file"
    )
    default_arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
    quality: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, description="levels of OpenAI's `quality` and the arguments of each"
    )
    denoising: DenoisingArgs = Field(default_factory=DenoisingArgs, description="the step engine")
    watchdog: WatchdogArgs = Field(default_factory=WatchdogArgs, description="when work is taken to hang")
