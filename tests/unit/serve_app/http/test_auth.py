"""API keys and cross-origin rules in front of the real routes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from serve_app.api_keys import ApiKeys, new_key
from serve_app.tools.keys import main
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
            assert (await client.get(path)).status_code == 401, path


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


def test_a_changed_file_counts_at_once(key_file):
    (anna, anna_line), (berta, berta_line) = new_key("anna"), new_key("berta")
    write(key_file, anna_line)
    keys = ApiKeys(key_file)
    assert (keys.label_of(anna), keys.label_of(berta)) == ("anna", None)
    write(key_file, berta_line)
    assert (keys.label_of(anna), keys.label_of(berta)) == (None, "berta")


def test_a_file_that_becomes_broken_changes_no_keys_and_is_told(key_file, caplog):
    key, line = new_key("anna")
    write(key_file, line)
    keys = ApiKeys(key_file)
    write(key_file, line, "anna:nothex")
    assert keys.label_of(key) == "anna"
    assert "line 2" in caplog.text
    key_file.unlink()
    assert keys.label_of(key) == "anna"
    write(key_file, "")
    assert keys.label_of(key) is None


@pytest.mark.parametrize("line", ["anna", "anna:12", ":" + "0" * 64, "an na:" + "0" * 64, "anna:" + "G" * 64])
def test_a_line_that_is_wrong_is_named_at_start(key_file, line):
    write(key_file, "# fine", line)
    with pytest.raises(ValueError, match="api_keys_file: line 2"):
        ApiKeys(key_file)


def test_a_file_that_is_not_there_is_named_at_start(key_file):
    with pytest.raises(ValueError, match=r"api_keys_file: .*keys"):
        ApiKeys(key_file)


def test_the_command_prints_a_key_that_its_line_lets_in(key_file, capsys):
    assert main(["new", "anna@example.com"]) == 0
    line, key = (text.split()[-1] for text in capsys.readouterr().out.splitlines())
    write(key_file, line)
    assert ApiKeys(key_file).label_of(key) == "anna@example.com"
    assert key not in line
    assert main(["new", "two words"]) == 2


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
