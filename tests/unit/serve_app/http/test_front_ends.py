"""Each common front end gets a picture for the body that it sends by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.front_ends import SENT_BY_DEFAULT, SentByDefault
from tests.support.in_process import Server, description, picture, serving

NAMES = ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "outputs") as server:
        server.configure(description("FluxKontextPipeline", "image"), model_aliases=NAMES)
        yield server


async def post(server: Server, sent: SentByDefault) -> httpx.Response:
    if sent.file is None:
        return await server.post(sent.path, json=sent.fields)
    return await server.post(sent.path, data=sent.fields, files={sent.file: ("x.png", picture(), "image/png")})


@pytest.mark.parametrize("sent", SENT_BY_DEFAULT, ids=lambda sent: sent.front_end)
async def test_a_front_end_gets_a_picture_for_what_it_sends_by_default(server: Server, sent: SentByDefault) -> None:
    answer = await post(server, sent)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert all(item[sent.reads] for item in content["data"])
    assert {warning["param"] for warning in content["warnings"]} == sent.means_nothing


async def test_an_alias_is_listed_and_leads_to_the_same_model(server: Server) -> None:
    async with server.client() as client:
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        details = await client.get("/v1/models/dall-e-3")
        unknown = await client.get("/v1/models/dall-e-4")
    assert listed == ["flux", *NAMES]
    assert (details.json()["id"], unknown.status_code) == ("dall-e-3", 404)
