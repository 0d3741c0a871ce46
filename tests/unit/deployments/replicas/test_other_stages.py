"""A request's thread asks another stage through the event loop, and gets its answer or its error."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import InvalidRequestError
from deployments.messages import (
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    GenerationRequest,
    OutputFormat,
    Packed,
)
from deployments.replicas.other_stages import OtherStages

REQUEST = GenerationRequest("r", "tiny", {}, 0, OutputFormat("image", "png"))
CALL = ComponentCall("vae", "encode", Packed(None))


def handle(**methods: Any) -> Any:
    return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})


async def encode(request: GenerationRequest) -> Conditioning:
    if request is not REQUEST:
        raise InvalidRequestError("another")
    return Conditioning(Packed("encoded"))


async def call_component(call: ComponentCall) -> ComponentAnswer:
    return ComponentAnswer(Packed(f"{call.component}.{call.method}"))


def others() -> OtherStages:
    return OtherStages({"encoder": handle(encode=encode), "vae": handle(call_component=call_component)})


async def test_a_thread_is_answered_by_the_stage_that_it_asks() -> None:
    stages = others()
    stages.use_running_loop()
    assert (await asyncio.to_thread(stages.encode, REQUEST)).calls.tree == "encoded"
    assert (await asyncio.to_thread(stages.call_component, "vae", CALL)).outcome.tree == "vae.encode"


async def test_the_error_of_the_stage_is_raised_in_the_thread() -> None:
    stages = others()
    stages.use_running_loop()
    another = GenerationRequest("s", "tiny", {}, 0, OutputFormat("image", "png"))
    with pytest.raises(InvalidRequestError, match="another"):
        await asyncio.to_thread(stages.encode, another)


def test_a_replica_that_starts_waits_without_an_event_loop() -> None:
    conditioning = Conditioning(Packed("encoded"))
    stages = OtherStages({"encoder": handle(encode=lambda request: SimpleNamespace(result=lambda: conditioning))})
    assert stages.encode(REQUEST) is conditioning
