"""The LoRAs that requests may name: /v1/loras, our own routes."""

from __future__ import annotations

import contextlib
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.functional_validators import AfterValidator

from deployments.adapters.args import check_weight_name
from deployments.errors import InvalidRequestError, NotSupportedError
from serve_app.adapters.adapters import NewAdapter
from serve_app.adapters.names import NAME_PATTERN, AdapterName, adapter_in, name_in_model
from serve_app.adapters.places import MAX_PATH_CHARS
from serve_app.adapters.records import ServedAdapter, Source
from serve_app.errors import AdapterNotFoundError, ConflictError, NotAllowedError
from serve_app.http.context import Context, RequestContext
from serve_app.http.reading import JSONRoute
from serve_app.models.service import ModelService
from serve_app.requests.loras import Scale
from serve_app.requests.plain_values import given_value
from serve_app.service import Service

MAX_FILE_NAME_CHARS = 255
MOST_NAMES = 20  # in an error


class NewLoRABody(BaseModel):
    """The body of POST /v1/loras."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    given_value = field_validator("*", mode="before")(classmethod(given_value))

    model: str | None = Field(
        None, max_length=MAX_FILE_NAME_CHARS, description="the model that it changes; needed where several are served"
    )
    name: AdapterName = Field(description="that requests give", json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
    path: str = Field(
        min_length=1,
        max_length=MAX_PATH_CHARS,
        description="a file or folder in a folder of the server's adapter_places, s3://bucket/key, or owner/repository",
    )
    weight_name: Annotated[str, AfterValidator(check_weight_name)] | None = Field(
        None, max_length=MAX_FILE_NAME_CHARS, description="the file, where `path` is a place with several"
    )
    component: str | None = Field(
        None,
        max_length=MAX_FILE_NAME_CHARS,
        pattern=r"^[A-Za-z]\w*$",
        description="into which it goes, where the pipeline has several of a kind; null: where its loader puts it",
    )
    scale: Scale = Field(1.0, description="of requests that give none: a number, or one for each component")


class LoRAObject(BaseModel):
    """A LoRA."""

    id: str = Field(description="for `model` in a request")
    object: Literal["lora"] = "lora"
    name: str = Field(description="for `loras` in a request")
    parent: str = Field(description="the model that it changes")
    created: int = Field(description="Unix time in seconds")
    source: Source
    scale: float | dict[str, float] = Field(description="of requests that give none")
    digest: str | None = Field(description="SHA-256 of the file; null: no stage has read it yet")
    components: list[str] | None = Field(description="of the pipeline, that it changes")
    rank: int | None
    bytes: int | None
    held_by: dict[str, int] = Field(description="replicas of each deployment that have it in memory")


class LoRAList(BaseModel):
    """GET /v1/loras."""

    object: Literal["list"] = "list"
    data: list[LoRAObject]


class DeletedLoRA(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["lora.deleted"] = "lora.deleted"
    name: str
    deleted: Literal[True] = True


def lora_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JSONRoute)

    @router.get("/v1/loras")
    async def list_loras(context: Context) -> LoRAList:
        """Those of the configuration and those that were added, with what is known of each."""
        models = service.models.of_caller(context.caller)
        return LoRAList(data=[each for model in models for each in await all_of(model)])

    @router.post("/v1/loras")
    async def add_lora(body: NewLoRABody, context: Context) -> LoRAObject:
        """Load one from a place that the server allows; answered when the model is known to take it."""
        check_may_change(service, context)
        model = service.models.one_for(body.model, context.caller)
        await model.served.wake_if_unknown()
        description = await model.describe()
        if not description.takes_adapters:
            raise NotSupportedError(f"{description.pipeline_class} takes no LoRA", "path")
        if (taken := service.models.called_as(model, body.name)) is not None:
            raise ConflictError(f"name: {body.name!r} is taken: a model is called {taken!r}", "name", "name_taken")
        new = NewAdapter(body.name, body.path, body.weight_name, body.component, body.scale)
        return described(model.name, await model.adapters.add(new), await model.adapters.held())

    @router.get("/v1/loras/{name:path}")
    async def read_lora(name: str, context: Context) -> LoRAObject:
        """One of them, as NAME or MODEL:NAME; its file is read if no stage has done it yet."""
        model, adapter = await find_lora(service, context, name)
        adapter = await model.adapters.with_facts(adapter)
        return described(model.name, adapter, await model.adapters.held())

    @router.delete("/v1/loras/{name:path}")
    async def delete_lora(name: str, context: Context) -> DeletedLoRA:
        """No request can name it any more; those under way go on."""
        check_may_change(service, context)
        model, adapter = await find_lora(service, context, name)
        await model.adapters.remove(adapter.name)
        return DeletedLoRA(id=name_in_model(model.name, adapter.name), name=adapter.name)

    return router


async def all_of(model: ModelService) -> list[LoRAObject]:
    held = await model.adapters.held()
    return [described(model.name, each, held) for each in await model.adapters.all()]


async def find_lora(service: Service, context: RequestContext, name: str) -> tuple[ModelService, ServedAdapter]:
    """The LoRA of this name, and its model. Raises AdapterNotFoundError, InvalidRequestError for one of two models."""
    models = service.models.of_caller(context.caller)
    for model in models:
        if (own := adapter_in(name, model.served.names)) is not None:
            return model, await model.adapters.get(own)
    found = []
    for model in models:
        with contextlib.suppress(AdapterNotFoundError):
            found.append((model, await model.adapters.get(name)))
    if len(found) > 1:
        choices = " or ".join(name_in_model(model.name, name) for model, _ in found)
        raise InvalidRequestError(f"name: several models have a LoRA {name[:80]!r}: say {choices}", "name")
    if not found:
        known = [name_in_model(model.name, each.name) for model in models for each in await model.adapters.all()]
        told = ", ".join(known[:MOST_NAMES]) or "none"
        raise AdapterNotFoundError(f"name: there is no LoRA {name[:80]!r} here, there are {told}", "name")
    return found[0]


def check_may_change(service: Service, context: RequestContext) -> None:
    """Raises NotAllowedError where `adapter_keys` has others than the caller's."""
    allowed = service.args.adapter_keys
    if allowed and context.caller not in allowed:
        raise NotAllowedError("this API key may not add or delete LoRAs")


def described(model: str, adapter: ServedAdapter, held: dict[str, dict[str, int]]) -> LoRAObject:
    facts = adapter.facts
    return LoRAObject(
        id=name_in_model(model, adapter.name),
        name=adapter.name,
        parent=model,
        created=int(adapter.created),
        source=adapter.source,
        scale=adapter.scale,
        digest=adapter.digest or None,
        components=None if facts is None else list(facts.components),
        rank=facts.rank if facts else None,
        bytes=facts.num_bytes if facts else None,
        held_by=held.get(adapter.digest, {}),
    )
