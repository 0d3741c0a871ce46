"""What wraps the making of media: a planted layer needs a row and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deployments.messages import GenerationRequest, Media
from env_config.variables import EnvConfig
from serve_app.making.follower import Follower, Make
from serve_app.making.layers import LAYERS, Layer, LayerContext
from serve_app.service import ServiceArgs, open_service
from tests.support.in_process import TEXT_TO_IMAGE, make_at_once
from tests.support.played_stages import PlayedHandle, played
from tests.support.stored_files import generation


def count(make: Make, context: LayerContext) -> Make:
    async def make_and_count(request: GenerationRequest, follower: Follower) -> Media:
        media = await make(request, follower)
        return dataclasses.replace(media, seconds=media.seconds | {"planted": 1.0})

    return make_and_count


async def test_a_row_puts_a_layer_round_everything_that_is_made(tmp_path: Path) -> None:
    env = EnvConfig.model_validate({"runtime": {"cache_root": tmp_path}})
    stages = played(PlayedHandle(TEXT_TO_IMAGE, make_at_once, make_at_once))
    service = await open_service(
        ServiceArgs(model_name="m"), env, {"m": stages}, "app", (Layer("planted", count), *LAYERS)
    )
    try:
        [media] = await service.models.all()[0].at_once.all([generation("a")], "")
    finally:
        service.close()
    assert media.seconds["planted"] == 1.0
