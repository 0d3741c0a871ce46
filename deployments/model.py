"""What is served: the arguments that every stage of an application shares."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelArgs(BaseModel):
    """The checkpoint and how its weights are held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="a checkpoint folder, s3://bucket/prefix, or a model id of the Hugging Face hub")
    name: str = Field(description="the name that callers use")
    dtype: DType = Field("auto", description="the dtype of the weights; auto: as stored in the checkpoint")
    default_arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
