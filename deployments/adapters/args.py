"""The adapters that a configuration names, and how many of them a process keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# By component, such as {transformer: 0.8, text_encoder: 0}; one number is for all.
Scale = float | dict[str, float]


def check_weight_name(name: str) -> str:
    """Raises ValueError for what is no file of weights, or leads out of its folder."""
    if "/" in name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} must be the name of a .safetensors file")
    return name


class AdapterArgs(BaseModel):
    """A LoRA that requests may name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1,
        description="a .safetensors file, a folder, s3://bucket/prefix, or a repository of the Hugging Face hub",
    )
    weight_name: Annotated[str, AfterValidator(check_weight_name)] | None = Field(
        None, description="the file, where `path` is a place with several; null: the only one"
    )
    component: str | None = Field(
        None,
        pattern=r"^[A-Za-z]\w*$",
        description="into which the file goes, where the pipeline has several of a kind, such as transformer_2 of "
        "Wan2.2; null: where its loader puts it",
    )
    scale: Scale = Field(1.0, description="for requests that give none; a number, or one for each component")
    preload: bool = Field(False, description="load it when a replica starts, not with its first request")


def adapter_of(value: object) -> object:
    """A path alone is an adapter."""
    return {"path": value} if isinstance(value, str) else value


Adapter = Annotated[AdapterArgs, BeforeValidator(adapter_of)]


class AdapterCacheArgs(BaseModel):
    """How many adapters a process keeps: those used longest ago go from the device to the host, then to the disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_device_bytes: int = Field(1024**3, ge=0, description="of adapters on the device, those in use not counted out")
    max_host_bytes: int = Field(4 * 1024**3, ge=0, description="of adapters in the host's memory")
    max_disk_bytes: int | None = Field(None, ge=0, description="of fetched files below the cache root; null: no bound")
