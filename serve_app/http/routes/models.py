"""What is served: /v1/models, /health, and /model_info as SGLang's gateway and benchmark ask for it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, get_args

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, JsonValue

from deployments.errors import StageUnavailableError
from deployments.messages import MediaKind, StageDescription, Task
from serve_app.adapters.names import name_in_model
from serve_app.http.answers import ModelCard, ModelList
from serve_app.http.context import Context
from serve_app.making.health import read_health
from serve_app.making.served_model import USUAL_LEVEL, ServedModel
from serve_app.making.sleep.model_sleep import FRESH_S
from serve_app.models.service import ModelService
from serve_app.requests.given.configured import as_configured, default_of
from serve_app.requests.given.own_arguments import OTHER_NAMES
from serve_app.requests.given.schemas import json_schema, medium_of, model_fields, without_notes
from serve_app.requests.limits import RequestLimits
from serve_app.requests.outputs import MEDIA
from serve_app.requests.translate import sendable_arguments
from serve_app.service import Service

EDIT_ROUTE = "/v1/images/edits"  # where models are asked that make nothing without a picture
MOST_PREVIEWS = 3  # of `partial_images`


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
    default: JsonValue = Field(description="what counts where a request names none; null: none, or no plain value")
    required: bool
    media: Literal["picture", "video", "sound"] | None = Field(description="null: a plain value or an object")
    accepts: dict[str, JsonValue] = Field(description="JSON Schema of the values, with their bounds where known")
    description: str = Field(description="of the pipeline's own docstring; empty: it has none")
    when: str = Field(description="always, or with what it matters; empty: not known")


class Sides(BaseModel):
    """What width and height of `size` may be, in pixels."""

    default_width: int | None = Field(description="where a request names no size; null: the pipeline decides")
    default_height: int | None
    multiple_of: int
    max_side: int
    max_pixels: int = Field(description="width x height")


class HowToAsk(BaseModel):
    """What the model makes, and where it is asked for."""

    makes: MediaKind
    route: str = Field(description="that takes `arguments` as fields of its body")
    tasks: list[Task]
    size: Sides | None = Field(description="null: it has no size")
    max_n: int
    output_formats: list[str]
    previews: int = Field(description="the most that `partial_images` may be; 0: it has no such field")


class ModelDetails(ModelCard):
    """GET /v1/models/{model}."""

    asked: HowToAsk | None = Field(description="null: the model is not ready to tell")
    arguments: list[ModelArgument] | None = Field(description="null: the model is not ready to tell")
    quality: list[str] = Field(description="levels of `quality` that are configured; `auto`: that of requests without")
    levels: dict[str, dict[str, JsonValue]] | None = Field(
        description="what counts with each level in place of `default`, by argument; null: the model is not ready"
    )


def how_to_ask(description: StageDescription, limits: RequestLimits) -> HowToAsk:
    """By what the stages say of the model."""
    medium = MEDIA[description.media_kind]
    is_edit = description.media_kind == "image" and description.needs_picture
    sides = Sides(
        default_width=description.default_width,
        default_height=description.default_height,
        multiple_of=description.size_multiple,
        max_side=limits.max_side,
        max_pixels=limits.max_pixels,
    )
    formats = get_args(medium.body.model_fields["output_format"].annotation)
    return HowToAsk(
        makes=description.media_kind,
        route=EDIT_ROUTE if is_edit else medium.route,
        tasks=list(description.tasks),
        size=sides if description.takes("width") and description.takes("height") else None,
        max_n=limits.max_images,
        output_formats=[each for each in formats if each != "gif" or description.media_kind == "video"],
        previews=MOST_PREVIEWS if "partial_images" in medium.body.model_fields else 0,
    )


async def read_arguments(model: ModelService) -> list[ModelArgument] | None:
    """None while the stages cannot be asked."""
    try:
        description = await model.describe_as_configured()
    except StageUnavailableError:
        return None
    body = MEDIA[description.media_kind].body
    fields = sendable_arguments(body, description)
    if how_to_ask(description, model.limits).route == EDIT_ROUTE:
        of_edits = {name: field for field, name in OTHER_NAMES.items() if not description.takes(field)}
        fields = {name: of_edits.get(name, field) for name, field in fields.items()}
    known = await model.served.arguments(tuple(fields))
    if known is None:
        return None
    schemas = model_fields(body, description, model.limits)
    return [
        ModelArgument(
            field=fields[argument.name],
            required=argument.name in description.required or (argument.name == "prompt"),
            media=medium_of(description.type_of(argument.name)),
            accepts=without_notes(schemas.get(argument.name) or json_schema(description.type_of(argument.name))),
            description=description.notes_of(argument.name).description,
            default=default_of(argument.name, argument.default, description),
            **{name: getattr(argument, name) for name in ("name", "type", "when")},
        )
        for argument in known
    ]


def levels_of(description: StageDescription, served: ServedModel) -> dict[str, dict[str, JsonValue]]:
    """The arguments in which a level differs from a request without one, which may be a level too."""
    usual = served.quality.get(USUAL_LEVEL, {})
    levels = {}
    for level, own in served.quality.items():
        told = as_configured(description, served.default_arguments | own)
        levels[level] = {name: default_of(name, told.parameters.get(name), told) for name in sorted({*usual, *own})}
    return levels


def model_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models(context: Context) -> ModelList:
        """Each model under all its names, and its LoRAs; those that the caller's key may use."""
        cards = await asyncio.gather(*map(cards_of, service.models.of_caller(context.caller)))
        return ModelList(data=[card for each in cards for card in each])

    @router.get("/v1/models/{model:path}")
    async def read_model(model: str, context: Context) -> ModelDetails:
        """The model, and the arguments that its checkpoint reads. Its id may have slashes, as those of the hub do."""
        found = service.models.named(model, context.caller)
        adapter = await found.adapter_in(model)
        created = found.served.created if adapter is None else int(adapter.created)
        arguments = await read_arguments(found)
        asked = levels = None
        if arguments is not None:
            asked = how_to_ask(await found.describe_as_configured(), found.limits)
            levels = levels_of(await found.describe(), found.served)
        return ModelDetails(
            id=model,
            created=created,
            parent=None if adapter is None else found.name,
            alias_of=found.name if adapter is None and model != found.name else None,
            **await state_of(found),
            asked=asked,
            arguments=arguments,
            quality=sorted(found.served.quality),
            levels=levels,
        )

    @router.get("/model_info", include_in_schema=False)
    @router.get("/v1/model_info")
    async def read_model_info(context: Context, model: str | None = None) -> ModelInfo:
        """What is served, in SGLang's words; of several models the first, where none is named."""
        found = service.models.named(model, context.caller) if model else service.models.first_for(context.caller)
        await found.adapter_in(model)  # which is there
        description = await found.describe()
        return ModelInfo(
            model_path=found.name,
            architectures=[description.pipeline_class],
            is_image_gen=description.media_kind == "image",
            output_types=[description.media_kind],
        )

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 when every stage of every model can serve, or sleeps until it is asked; else 503 with what is missing."""
        content = await read_health(service.models.stages())
        return JSONResponse(content, status_code=503 if content["missing"] else 200)

    return router


async def cards_of(model: ModelService) -> list[ModelCard]:
    """The model under each of its names, and its LoRAs."""
    served, state = model.served, await state_of(model)
    models = [
        ModelCard(id=name, created=served.created, alias_of=served.name if name != served.name else None, **state)
        for name in served.names
    ]
    adapters = [
        ModelCard(id=name_in_model(served.name, each.name), created=int(each.created), parent=served.name, **state)
        for each in await model.adapters.all()
    ]
    return [*models, *adapters]


async def state_of(model: ModelService) -> dict[str, Any]:
    """The fields of a card that the stages tell; those that sleep are not asked."""
    sleep = model.stages.sleep
    state = await sleep.state(FRESH_S)
    try:
        kind = (await model.describe()).media_kind
    except StageUnavailableError:
        kind, state = None, "loading" if state == "ready" else state
    if state == "ready":
        return {"kind": kind, "state": state}
    load_s = (await sleep.facts()).load_s
    return {
        "kind": kind,
        "state": "asleep" if state == "asleep" else "loading",
        "load_s": None if load_s is None else round(load_s, 1),
    }
