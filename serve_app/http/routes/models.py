"""What is served: /v1/models, /health, and /model_info as SGLang's gateway and benchmark ask for it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, JsonValue

from deployments.errors import StageUnavailableError
from deployments.messages import MediaKind
from serve_app.adapters.names import name_in_model
from serve_app.http.answers import ModelCard, ModelList
from serve_app.making.health import read_health
from serve_app.requests.given.schemas import json_schema, medium_of, model_fields, without_notes
from serve_app.requests.outputs import MEDIA
from serve_app.requests.translate import sendable_arguments
from serve_app.service import Service


class ModelInfo(BaseModel):
    """Those of SGLang's fields that say something here."""

    model_path: str  # the name that requests give as `model`, and no path of this machine
    is_generation: Literal[True] = True
    model_type: Literal["diffusion"] = "diffusion"
    architectures: list[str]
    is_image_gen: bool
    output_types: list[MediaKind]


class ModelArgument(BaseModel):
    """An argument of the pipeline's call that the served checkpoint reads."""

    name: str
    field: str = Field(description="of the body")
    type: str = Field(description="any: not known")
    default: JsonValue = Field(description="null: none, or no plain value")
    required: bool
    media: Literal["picture", "video", "sound"] | None = Field(description="null: a plain value or an object")
    accepts: dict[str, JsonValue] = Field(description="JSON Schema of the values, with their bounds where known")
    description: str = Field(description="of the pipeline's own docstring; empty: it has none")
    when: str = Field(description="always, or with what it matters; empty: not known")


class ModelDetails(ModelCard):
    """GET /v1/models/{model}."""

    arguments: list[ModelArgument] | None = Field(description="null: the model is not ready to tell")
    quality: list[str] = Field(description="levels of `quality` that are configured")


async def read_arguments(service: Service) -> list[ModelArgument] | None:
    """None while the stages cannot be asked."""
    try:
        description = await service.model.describe()
    except StageUnavailableError:
        return None
    body = MEDIA[description.media_kind].body
    fields = sendable_arguments(body, description)
    known = await service.model.arguments(tuple(fields))
    if known is None:
        return None
    schemas = model_fields(body, description, service.args.limits)
    return [
        ModelArgument(
            field=fields[argument.name],
            required=argument.name in description.required or (argument.name == "prompt"),
            media=medium_of(description.type_of(argument.name)),
            accepts=without_notes(schemas.get(argument.name) or json_schema(description.type_of(argument.name))),
            description=description.notes_of(argument.name).description,
            **vars(argument),
        )
        for argument in known
    ]


def model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    served = service.model

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        models = [ModelCard(id=name, created=served.created) for name in served.names]
        adapters = [
            ModelCard(id=name_in_model(served.name, each.name), created=int(each.created), parent=served.name)
            for each in await service.adapters.all()
        ]
        return ModelList(data=[*models, *adapters])

    @router.get("/v1/models/{model:path}")
    async def read_model(model: str) -> ModelDetails:
        """The model, and the arguments that its checkpoint reads. Its id may have slashes, as those of the hub do."""
        adapter = await service.adapter_in(model)
        created = served.created if adapter is None else int(adapter.created)
        arguments = await read_arguments(service)
        return ModelDetails(
            id=model,
            created=created,
            parent=None if adapter is None else served.name,
            arguments=arguments,
            quality=sorted(served.quality),
        )

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
