"""API keys and cross-origin rules in front of the real routes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import openai
import pytest

from serve_app.api_keys import new_key
from tests.support.in_process import Server, serving

BODY = {"prompt": "x"}
GENERATIONS = "/v1/images/generations"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def write(file: Path, *lines: str) -> None:
    """As an editor saves it: another file in its place."""
    new = file.with_suffix(".new")
    new.write_text("\n".join(lines), encoding="utf-8")
    os.replace(new, file)


async def post_with(server: Server, authorization: str | None) -> int:
    headers = {} if authorization is None else {"authorization": authorization}
    return (await server.post(GENERATIONS, json=BODY, headers=headers)).status_code


async def test_a_key_opens_every_route_and_no_other_does(server, key_file):
    (key, line), (other, _) = new_key("anna"), new_key("berta")
    write(key_file, "# keys", "", line)
    server.configure(api_keys_file=key_file)
    assert await post_with(server, f"Bearer {key}") == 200
    assert await post_with(server, f"bearer {key}") == 200
    for wrong in (None, "", "Bearer", "Bearer ", key, f"Basic {key}", f"Bearer {other}", f"Bearer {key}x", "Bearer é"):
        assert await post_with(server, wrong and wrong.encode()) == 401, wrong
    async with server.client() as client:
        for path in ("/v1/models", "/openapi.json", "/docs", "/v1/files/images/x", "/nothing", "/health/", "//health"):
            url = httpx.URL("http://test/").copy_with(raw_path=path.encode())  # with its slashes as they are
            assert (await client.get(url)).status_code == 401, path


async def test_a_refusal_is_in_openais_shape(server, key_file):
    write(key_file, new_key("anna")[1])
    server.configure(api_keys_file=key_file)
    transport = httpx2.ASGITransport(server)
    client = openai.AsyncOpenAI(
        base_url="http://test/v1",
        api_key="sk-wrong",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(transport=transport),
    )
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.images.generate(prompt="x")
    assert refused.value.code == "invalid_api_key"
    assert refused.value.response.headers["www-authenticate"] == "Bearer"
    assert "sk-wrong" not in str(refused.value)


async def test_health_needs_no_key(server, key_file):
    write(key_file, new_key("anna")[1])
    server.configure(api_keys_file=key_file)
    async with server.client() as client:
        assert (await client.get("/health")).status_code == 200


async def test_without_a_file_no_key_is_asked_for(server):
    assert await post_with(server, None) == 200


async def test_a_refused_body_is_not_read(server, key_file):
    write(key_file, new_key("anna")[1])
    server.configure(api_keys_file=key_file)
    sent = 0

    async def body():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 1000

    async with server.client() as client:
        answer = await client.post(GENERATIONS, content=body())
    assert (answer.status_code, sent) == (401, 0)


# --- cross-origin ---


async def preflight(server: Server) -> dict[str, str]:
    async with server.client() as client:
        answer = await client.options(
            GENERATIONS, headers={"origin": "https://a.example", "access-control-request-method": "POST"}
        )
    return dict(answer.headers)


async def test_no_origin_is_allowed_by_default(server):
    assert "access-control-allow-origin" not in await preflight(server)


async def test_a_listed_origin_is_allowed_before_it_has_a_key(server, key_file):
    write(key_file, new_key("anna")[1])
    server.configure(cors_origins=("https://a.example",), api_keys_file=key_file)
    assert (await preflight(server))["access-control-allow-origin"] == "https://a.example"
    server.configure(cors_origins=("https://b.example",))
    assert "access-control-allow-origin" not in await preflight(server)
