"""GET /model_info and /v1/model_info: what SGLang's gateway and benchmark ask a server for before they begin."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from deployments.messages import MediaKind
from serve_app.http.errors import ServeErrorRoute
from serve_app.http.routes.jobs import this_replica

router = APIRouter(route_class=ServeErrorRoute)


class ModelInfo(BaseModel):
    """Those of SGLang's fields that say something here."""

    model_path: str  # the name that requests give as `model`, and no path of this machine
    is_generation: Literal[True] = True
    model_type: Literal["diffusion"] = "diffusion"
    architectures: list[str]
    is_image_gen: bool
    output_types: list[MediaKind]


@router.get("/model_info", include_in_schema=False)
@router.get("/v1/model_info")
async def read_model_info() -> ModelInfo:
    """What is served, in SGLang's words."""
    ingress = this_replica()
    description = await ingress.describe()
    return ModelInfo(
        model_path=ingress.args.model_name,
        architectures=[description.pipeline_class],
        is_image_gen=description.media_kind == "image",
        output_types=[description.media_kind],
    )
