"""Settings of a denoiser that several ranks compute together."""

from __future__ import annotations

from math import prod
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

WAYS = ("ulysses", "ring", "tensor", "batch")  # rows of deployments.ranks.splits
OF_GUIDANCE = (
    "batch splits the passes of guidance too, where they share a forward, and those of pipelines that make them one "
    "after the other share one with denoising: {guidance_passes: together}"
)


class ParallelArgs(BaseModel):
    """How many ranks share a forward, and how; with several ways there are as many ranks as their product."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ulysses: int = Field(1, ge=1, description="ranks over which the sequence is split, and in attention the heads")
    ring: int = Field(1, ge=1, description="ranks over which the sequence is split in attention too")
    tensor: int = Field(1, ge=1, description="ranks over which the weights are split")
    batch: int = Field(1, ge=1, description="ranks over which the samples of a forward are split")
    collective_timeout_s: float = Field(
        120, gt=0, description="longest that ranks wait for each other within a forward, seconds; then the group ends"
    )
    silence_timeout_s: float = Field(
        20, ge=2, description="a rank that has not been heard of for so long is taken to be stopped, seconds"
    )
    start_timeout_s: float = Field(3600, gt=0, description="longest that the ranks take to load the model, seconds")

    @model_validator(mode="before")
    @classmethod
    def name_the_way_of_guidance(cls, values: Any) -> Any:
        """Raises ValueError for what others call the split of guidance."""
        if isinstance(values, dict) and "cfg" in values:
            raise ValueError(f"unknown key 'cfg': {OF_GUIDANCE}; known: {', '.join(WAYS)}")
        return values

    @model_validator(mode="after")
    def check_ways(self) -> Self:
        """Raises ValueError."""
        if self.size == 1:
            raise ValueError(f"one of {', '.join(WAYS)} must be 2 or more; leave `parallel` out for one device")
        if self.tensor > 1 and self.ulysses * self.ring > 1:
            raise ValueError(
                f"tensor: {self.tensor} is not possible with ulysses or ring: diffusers splits either the weights or "
                "the sequence; a product with batch is allowed"
            )
        return self

    @property
    def degrees(self) -> dict[str, int]:
        """The ways that are used, each with its number of ranks."""
        return {way: getattr(self, way) for way in WAYS if getattr(self, way) > 1}

    @property
    def size(self) -> int:
        """Of the group: ranks."""
        return prod(self.degrees.values())

    @property
    def ranks_of_sample(self) -> int:
        """Ranks that compute each sample together."""
        return self.size // self.batch
