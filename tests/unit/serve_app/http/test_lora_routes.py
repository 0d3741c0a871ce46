"""LoRAs that are added, shown and deleted while the server runs: /v1/loras and /v1/models."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from deployments.errors import CheckpointError, InvalidRequestError, StageUnavailableError
from serve_app.adapters import adapters
from serve_app.jobs import database
from tests.support.in_process import Server, description, serving, until

FLUX = description("FluxPipeline", takes_adapters=True)
ASK = {"prompt": "a fox"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").touch()
    return folder


@pytest.fixture
def server(tmp_path: Path, place: Path) -> Iterator[Server]:
    with serving(tmp_path / "out") as server:
        server.configure(
            FLUX, adapters={"neon": {"path": "/srv/neon.safetensors", "scale": 0.7}}, adapter_places=(str(place),)
        )
        yield server


async def call(server: Server, method: str, path: str, **arguments: Any) -> httpx.Response:
    async with server.client() as client:
        return await client.request(method, path, **arguments)


async def add(server: Server, name: str = "sketch", path: str = "a.safetensors", **more: Any) -> httpx.Response:
    return await server.post("/v1/loras", json={"name": name, "path": path, **more})


async def names(server: Server) -> list[str]:
    return [each["name"] for each in (await call(server, "GET", "/v1/loras")).json()["data"]]


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def test_an_added_lora_is_shown_and_may_be_asked_for(server: Server, place: Path) -> None:
    answer = await add(server, scale={"transformer": 0.5})
    assert answer.status_code == 200, answer.text
    assert str(place) not in answer.text
    shown = answer.json()
    digest = shown.pop("digest")
    assert shown.pop("created") > 0
    assert shown == {
        "id": "flux:sketch", "object": "lora", "name": "sketch", "parent": "flux", "source": "added",
        "scale": {"transformer": 0.5}, "components": ["transformer", "text_encoder"], "rank": 4, "bytes": 900,
        "held_by": {},
    }  # fmt: skip
    server.handle.adapters.held = (digest,)
    assert (await call(server, "GET", "/v1/loras/sketch")).json()["held_by"] == {"Played": 1}
    assert await names(server) == ["neon", "sketch"]
    assert (await server.post("/v1/images/generations", json=ASK | {"loras": [{"name": "sketch"}]})).status_code == 200
    assert server.requests[0].features["loras"] == [
        {"name": "sketch", "path": f"{place}/a.safetensors", "weight_name": None, "component": None,
         "scale": {"transformer": 0.5}, "digest": digest}
    ]  # fmt: skip


async def test_the_models_list_has_each_lora_with_its_parent(server: Server) -> None:
    await add(server)
    listed = (await call(server, "GET", "/v1/models")).json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [
        ("flux", None), ("flux:neon", "flux"), ("flux:sketch", "flux"),
    ]  # fmt: skip
    assert (await call(server, "GET", "/v1/models/flux:sketch")).json()["parent"] == "flux"
    assert error_of(await call(server, "GET", "/v1/models/flux:nothing")) == (404, "model_not_found", "model")


async def test_one_of_the_configuration_is_read_when_it_is_asked_for(server: Server) -> None:
    listed = (await call(server, "GET", "/v1/loras")).json()["data"]
    assert (listed[0]["digest"], listed[0]["components"]) == (None, None)
    one = (await call(server, "GET", "/v1/loras/neon")).json()
    assert (one["source"], one["scale"], one["rank"]) == ("configuration", 0.7, 4)
    assert (await call(server, "GET", "/v1/loras")).json()["data"] == [one]


async def test_every_replica_of_the_ingress_and_a_new_one_serve_the_same_set(
    server: Server, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "FRESH_S", 0.0)
    with serving(tmp_path / "out") as other:  # the same cache root
        other.configure(FLUX, adapter_places=(str(place),))
        assert await names(other) == []
        await add(server)
        assert await names(other) == ["sketch"]
        assert (await call(other, "DELETE", "/v1/loras/sketch")).json()["deleted"] is True
        assert await names(server) == ["neon"]
        monkeypatch.setattr(adapters, "FRESH_S", 60.0)
        assert await names(server) == ["neon"]  # that counts now: what is not in it is looked for at once
        await add(other)
        assert (await server.post("/v1/images/generations", json=ASK | {"loras": ["sketch"]})).status_code == 200
    server.configure(FLUX, adapter_places=(str(place),))
    assert await names(server) == ["sketch"]


async def test_what_lies_in_a_place_that_is_not_allowed_any_more_is_not_served(server: Server, tmp_path: Path) -> None:
    await add(server)
    server.configure(FLUX, adapter_places=("owner",))
    assert await names(server) == []
    server.configure(FLUX)
    assert error_of(await call(server, "GET", "/v1/loras/sketch")) == (404, "lora_not_found", "name")


async def test_a_name_stands_for_one_content(server: Server) -> None:
    first = await add(server)
    again = await add(server)
    assert (again.status_code, again.json()) == (200, first.json())
    assert error_of(await add(server, path="b.safetensors")) == (409, "name_taken", "name")
    assert error_of(await add(server, scale=0.5)) == (409, "name_taken", "name")
    assert error_of(await add(server, name="neon")) == (409, "name_taken", "name")
    assert (await call(server, "GET", "/v1/loras/sketch")).json() == first.json()


async def test_a_deleted_one_is_gone_and_requests_that_named_it_go_on(server: Server) -> None:
    digest = (await add(server)).json()["digest"]
    release = asyncio.Event()
    made = server.make

    async def slowly(request: Any) -> Any:
        await release.wait()
        return await made(request)

    server.make = slowly
    asking = asyncio.create_task(server.post("/v1/images/generations", json=ASK | {"loras": ["sketch"]}))
    await until(lambda: len(server.requests) == 1)
    assert (await call(server, "DELETE", "/v1/loras/sketch")).status_code == 200
    await until(lambda: server.handle.adapters.forgotten == [digest])
    assert error_of(await call(server, "DELETE", "/v1/loras/sketch")) == (404, "lora_not_found", "name")
    assert error_of(await call(server, "DELETE", "/v1/loras/neon")) == (409, "lora_configured", "name")
    release.set()
    assert (await asking).status_code == 200


UNREADABLE: list[tuple[Exception, tuple[int, str, str | None]]] = [
    (InvalidRequestError("{path} has no layers of a LoRA", "loras"), (400, "invalid_value", "path")),
    (StageUnavailableError("{path} cannot be fetched now: 503"), (503, "stage_unavailable", None)),
    (CheckpointError("{path}: broken"), (503, "stage_unavailable", None)),
    (OSError(28, "no room at {path}"), (503, "stage_unavailable", None)),
]


async def test_what_cannot_be_read_leaves_everything_as_it_was(server: Server, place: Path) -> None:
    path = f"{place}/a.safetensors"
    for error, expected in UNREADABLE:
        arguments = (each.replace("{path}", path) if isinstance(each, str) else each for each in error.args)
        server.handle.adapters.found[path] = type(error)(*arguments)
        answer = await add(server)
        assert error_of(answer) == expected
        assert str(place) not in answer.text
        assert await names(server) == ["neon"]
    server.handle.adapters.found.clear()
    assert (await add(server)).status_code == 200


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"name": name}, "name")
    for name in (
        "",
        "a:b",
        "a/b",
        "..",
        ".a",
        "-a",
        "a b",
        "a\n",
        "ѕketch",
        "sketch\u200b",
        "x" * 10_000,
        "a\0",
        None,
        5,
    )
]
HOSTILE += [({"path": path}, "path") for path in ("", "../a.safetensors", "/etc/passwd", "x" * 10_000, None, ["a"])]
HOSTILE += [
    ({"weight_name": name}, "weight_name") for name in ("../a.safetensors", "a.bin", "x" * 300 + ".safetensors")
]
HOSTILE += [
    ({"scale": scale}, "scale")
    for scale in (True, "1", [], {}, {"transformer": True}, {"transformer": {"x": 1}}, {"vae": 1}, 11, -11, 10**400)
]
HOSTILE += [({"more": 1}, "more")]


async def test_a_body_that_does_not_fit_is_refused_by_its_field(server: Server) -> None:
    for change, param in HOSTILE:
        answer = await server.post("/v1/loras", json={"name": "sketch", "path": "a.safetensors"} | change)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (change, answer.text)
        assert len(answer.text) < 1000
    for word in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000):
        body = '{"name": "sketch", "path": "a.safetensors", "scale": WORD}'.replace("WORD", word)
        answer = await server.post("/v1/loras", content=body, headers={"content-type": "application/json"})
        assert error_of(answer) == (400, "invalid_value", "scale")
    assert await names(server) == ["neon"]


async def test_nothing_is_added_where_no_place_is_allowed_or_the_model_takes_none(server: Server, place: Path) -> None:
    server.configure(FLUX)
    assert error_of(await add(server)) == (400, "not_supported", "path")
    server.configure(description("ToyPipeline"), adapter_places=(str(place),))
    assert error_of(await add(server)) == (400, "not_supported", "path")


async def test_with_keys_those_of_the_configuration_may_add_and_delete(server: Server, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{label}:{hashlib.sha256(label.encode()).hexdigest()}\n" for label in ("chief", "guest")))
    place = str(tmp_path / "loras")
    chief, guest = ({"Authorization": f"Bearer {label}"} for label in ("chief", "guest"))
    new = {"name": "sketch", "path": "a.safetensors"}
    for allowed, expected in (((), 200), (("chief",), 403)):
        server.configure(FLUX, adapter_places=(place,), api_keys_file=keys, adapter_keys=allowed)
        answer = await server.post("/v1/loras", json=new, headers=guest)
        assert answer.status_code == expected
        assert (await server.post("/v1/loras", json=new, headers=chief)).status_code == 200
        assert (await call(server, "GET", "/v1/loras/sketch", headers=guest)).status_code == 200
    refused = await call(server, "DELETE", "/v1/loras/sketch", headers=guest)
    assert error_of(refused) == (403, "not_allowed", None)
    assert (await call(server, "DELETE", "/v1/loras/sketch", headers=chief)).status_code == 200
    with pytest.raises(ValidationError, match="adapter_keys"):
        server.configure(FLUX, adapter_keys=("chief",))


async def test_no_more_are_kept_than_the_limit(server: Server, place: Path) -> None:
    server.configure(FLUX, adapter_places=(str(place),), limits={"max_added_loras": 1})
    assert (await add(server)).status_code == 200
    assert error_of(await add(server, name="other")) == (400, "limit_exceeded", "name")
    assert (await add(server)).status_code == 200


async def test_a_store_that_is_away_is_a_503_that_says_when_to_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WRITE_WAIT_S", 0.2)
    monkeypatch.setattr(adapters, "FRESH_S", 0.0)
    await add(server)
    file = Path(str(server.service.jobs.database.url.database))
    shutil.move(file, file.with_name("away"))
    sketch = ASK | {"loras": ["sketch"]}
    for answer in (
        await add(server),
        await call(server, "GET", "/v1/loras"),
        await call(server, "GET", "/v1/models"),
        await call(server, "DELETE", "/v1/loras/sketch"),
        await server.post("/v1/images/generations", json=sketch),
    ):
        assert error_of(answer)[:2] == (503, "job_store_unavailable"), answer.text
        assert int(answer.headers["retry-after"]) > 0
    for body in (ASK, ASK | {"loras": ["neon"]}):  # what needs no store goes on
        assert (await server.post("/v1/images/generations", json=body)).status_code == 200
    shutil.move(file.with_name("away"), file)
    assert (await server.post("/v1/images/generations", json=sketch)).status_code == 200


async def test_openais_client_lists_the_loras_among_the_models(server: Server) -> None:
    import httpx2

    http_client = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(server))
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client)
    assert [each.id async for each in client.models.list()] == ["flux", "flux:neon"]
    assert (await client.models.retrieve("flux:neon")).id == "flux:neon"
