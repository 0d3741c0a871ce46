"""What is served: /v1/models, /health, and /model_info as SGLang's gateway and benchmark ask for it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deployments.messages import MediaKind
from serve_app.http.answers import ModelCard, ModelList
from serve_app.making.health import read_health
from serve_app.service import Service


class ModelInfo(BaseModel):
    """Those of SGLang's fields that say something here."""

    model_path: str  # the name that requests give as `model`, and no path of this machine
    is_generation: Literal[True] = True
    model_type: Literal["diffusion"] = "diffusion"
    architectures: list[str]
    is_image_gen: bool
    output_types: list[MediaKind]


def model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    served = service.model

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[ModelCard(id=served.name, created=served.created)])

    @router.get("/v1/models/{model:path}")
    async def read_model(model: str) -> ModelCard:
        """The model of this id, which may have slashes in it, as ids of the Hugging Face hub do."""
        served.check_name(model)
        return ModelCard(id=served.name, created=served.created)

    @router.get("/model_info", include_in_schema=False)
    @router.get("/v1/model_info")
    async def read_model_info() -> ModelInfo:
        """What is served, in SGLang's words."""
        description = await served.describe()
        return ModelInfo(
            model_path=served.name,
            architectures=[description.pipeline_class],
            is_image_gen=description.media_kind == "image",
            output_types=[description.media_kind],
        )

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 when every stage can serve, else 503 with what is missing."""
        content = await read_health(service.stages)
        return JSONResponse(content, status_code=503 if content["missing"] else 200)

    return router
