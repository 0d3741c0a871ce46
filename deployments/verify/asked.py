"""What whoever checks wants of the request."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Asked(BaseModel):
    """None: as the pipeline's description says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    width: int | None = Field(None, ge=1, description="pixels")
    height: int | None = Field(None, ge=1, description="pixels")
    steps: int | None = Field(None, ge=1)
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description="further arguments of the call; @FILE stands for the picture in the file"
    )
