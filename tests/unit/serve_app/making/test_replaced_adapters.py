"""A LoRA whose file is replaced after a request was accepted: the request is made all the same, and says so."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from deployments.adapters.use import AdapterUse
from deployments.errors import AdapterReplacedError, InvalidRequestError
from deployments.messages import GenerationRequest, Media, RequestWarning
from serve_app.making.follower import Follower
from serve_app.making.layers.layer import LayerContext
from serve_app.making.layers.replaced_adapters import REPLACED_ADAPTERS
from tests.support.stored_files import generation

REQUEST = dataclasses.replace(
    generation("a"), features={"loras": [AdapterUse("neon", "/a", scale=0.5, digest="old").plain()], "cache_dit": {}}
)


class Heard(Follower):
    def __init__(self) -> None:
        self.warnings: list[RequestWarning] = []

    def on_warning(self, warning: RequestWarning) -> None:
        self.warnings.append(warning)


class Stages:
    """They refuse a digest that is not the file's."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked: list[GenerationRequest] = []

    async def make(self, request: GenerationRequest, _: Follower) -> Media:
        self.asked.append(request)
        if request.features["loras"][0]["digest"] == "old":
            raise self.error
        return Media(())


def layer(stages: Stages) -> Any:
    return REPLACED_ADAPTERS.wrap(stages.make, cast(LayerContext, None))


async def test_it_is_made_again_with_the_file_that_is_there() -> None:
    stages, heard = Stages(AdapterReplacedError("the file of 'neon' was replaced")), Heard()
    media = await layer(stages)(REQUEST, heard)
    [first, second] = stages.asked
    assert second.features == {"loras": [AdapterUse("neon", "/a", scale=0.5).plain()], "cache_dit": {}}
    assert dataclasses.replace(second, features=first.features) == first
    assert [(each.code, each.param) for each in media.warnings] == [("lora_replaced", "loras")]
    assert tuple(heard.warnings) == media.warnings


async def test_any_other_fault_of_a_lora_stays_one() -> None:
    stages = Stages(InvalidRequestError("it does not fit", "loras"))
    with pytest.raises(InvalidRequestError, match="does not fit"):
        await layer(stages)(REQUEST, Heard())
    assert len(stages.asked) == 1
