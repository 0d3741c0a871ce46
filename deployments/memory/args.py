"""Settings of what a model's stages do to fit on their devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt, model_validator


def switch_of(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(switch_of)]
OFFLOADED_BY_GROUPS = ("level", "blocks_per_group", "stream")


class TileRanksArgs(BaseModel):
    """The ranks that decode the tiles of one VAE replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: StrictInt = Field(ge=2, description="processes of a replica, each with all weights and a device of its own")
    answer_timeout_s: float = Field(
        600, gt=0, description="longest that rank 0 waits for the tiles of another, seconds; then the group ends"
    )
    silence_timeout_s: float = Field(
        20, ge=2, description="a rank that has not been heard of for so long is taken to be stopped, seconds"
    )
    start_timeout_s: float = Field(3600, gt=0, description="longest that the ranks take to load the model, seconds")


def ranks_of(value: Any) -> Any:
    """A number alone has the defaults."""
    return {"ranks": value} if isinstance(value, int) and not isinstance(value, bool) else value


TileRanks = Annotated[TileRanksArgs, BeforeValidator(ranks_of)]


class VAEArgs(BaseModel):
    """How the autoencoders of a pipeline are held and called, in the encoder stage and in the VAE stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tiling: Switch = Field(
        "auto",
        description="pictures in tiles, long videos in chunks of frames too; auto: where the size of a request needs "
        "more memory than is free",
    )
    slicing: Switch = Field(
        "auto",
        description="the pictures of a batch one by one; auto: where together they need more memory than is free",
    )
    tile: dict[str, StrictInt | StrictFloat] = Field(
        default_factory=dict,
        description="sizes of the tiles, by the autoencoder's own names, such as `tile_sample_min_height: 256`",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="the dtype of their weights; auto: that of `dtype` and `component_dtypes`"
    )
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "contiguous", description="how the weights of their convolutions lie in memory"
    )
    parallel: TileRanks | None = Field(
        None,
        description="a replica that decodes is a group of so many ranks, one on each device, which share out the tiles "
        "and slices of every decoding; needs `tiling: on`; null: one device",
    )

    @model_validator(mode="after")
    def check_tile(self) -> Self:
        """Raises ValueError."""
        for name, value in self.tile.items():
            if value < 0 or (value == 0 and "overlap" not in name):
                raise ValueError(f"tile: {name} must be a number above 0, got {value!r}")
        if self.tile and self.tiling == "off":
            raise ValueError("tile: sizes of tiles were given, and tiling is off")
        return self

    @model_validator(mode="after")
    def check_that_ranks_have_tiles(self) -> Self:
        """Raises ValueError."""
        if self.parallel is not None and self.tiling != "on":
            raise ValueError(
                f"parallel: {self.parallel.ranks} shares out tiles, and tiling is {self.tiling}: set `tiling: on`, or "
                "leave parallel out"
            )
        return self


class OffloadArgs(BaseModel):
    """Where the weights of one component wait while they are not used: on the host."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["group", "model"] = Field(
        description="group: its blocks come to the device one after another in each forward; model: all comes for "
        "its calls, and leaves when another one of this kind is called or its stage has nothing to do"
    )
    level: Literal["block", "leaf"] = Field("block", description="what a group is: blocks, or single layers")
    blocks_per_group: int = Field(1, ge=1, description="blocks that come to the device together")
    stream: Switch = Field(
        "auto", description="copy the next group while one computes; auto: for denoisers, where the device has streams"
    )
    pin_memory: bool = Field(
        True, description="keep the host's copy in pinned memory, where the device has it: faster copies, more memory"
    )

    @model_validator(mode="after")
    def check_kind(self) -> Self:
        """Raises ValueError."""
        given = [name for name in OFFLOADED_BY_GROUPS if name in self.model_fields_set]
        if self.kind == "model" and given:
            raise ValueError(f"{', '.join(given)}: only for kind: group")
        if self.level == "leaf" and "blocks_per_group" in self.model_fields_set:
            raise ValueError("blocks_per_group: only for level: block")
        if self.stream == "on" and self.blocks_per_group != 1:
            raise ValueError("blocks_per_group must be 1 where stream is on: the next block is copied meanwhile")
        return self


def offload_of(value: Any) -> Any:
    """A kind alone has the defaults."""
    return {"kind": value} if isinstance(value, str) else value


Offload = Annotated[OffloadArgs, BeforeValidator(offload_of)]
