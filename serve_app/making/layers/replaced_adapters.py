"""REPLACED_ADAPTERS: a request whose LoRA was replaced after it was accepted is made with the file of today."""

from __future__ import annotations

import dataclasses
import logging

from deployments.adapters.use import FEATURE
from deployments.errors import AdapterReplacedError
from deployments.messages import GenerationRequest, Media, RequestWarning
from serve_app.errors import original_error
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext

logger = logging.getLogger(__name__)


def with_what_is_there(make: Make, _: LayerContext) -> Make:
    async def make_with_what_is_there(request: GenerationRequest, follower: Follower) -> Media:
        try:
            return await make(request, follower)
        except Exception as error:
            failure = original_error(error)
            if not isinstance(failure, AdapterReplacedError):
                raise
            logger.warning("request %s starts again: %s", request.request_id, failure)
            warning = RequestWarning("lora_replaced", FEATURE, f"{failure.message}: made with the new one")
            follower.on_warning(warning)
            media = await make(without_digests(request), follower)
            return dataclasses.replace(media, warnings=(*media.warnings, warning))

    return make_with_what_is_there


def without_digests(request: GenerationRequest) -> GenerationRequest:
    """Any file is right. A checkpoint of the earlier one is of no use then: its fingerprint has that file's digest."""
    loras = [plain | {"digest": ""} for plain in request.features.get(FEATURE, ())]
    return dataclasses.replace(request, features=request.features | {FEATURE: loras})


REPLACED_ADAPTERS = Layer("replaced_adapters", with_what_is_there)
