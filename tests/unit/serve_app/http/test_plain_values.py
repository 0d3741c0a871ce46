"""What no body and no address may hold: NUL, truth values for numbers, numbers without end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from tests.support.in_process import Server, serving

LONG = "9" * 5000


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests: it refuses whatever they ask for."""
    with serving(tmp_path_factory.mktemp("plain") / "outputs") as running:
        yield running


BODIES = [
    ('{"prompt": "a\\u0000b"}', "prompt"),
    ('{"prompt": "a", "user": "\\u0000"}', "user"),
    ('{"prompt": "a", "extra_args": {"x": ["\\u0000"]}}', "extra_args"),
    ('{"prompt": "a", "cache_dit": {"\\u0000": 1}}', "cache_dit"),
    ('{"prompt": "a", "n": true}', "n"),
    ('{"prompt": "a", "guidance_scale": false}', "guidance_scale"),
    ('{"prompt": "a", "guidance_scale": 1e300}', "guidance_scale"),
    ('{"prompt": "a", "deadline_s": 1e300}', "deadline_s"),
    ('{"prompt": "a", "seed": ' + LONG + "}", "seed"),
    ('{"prompt": "a", "n": -' + LONG + "}", "n"),
    ('{"prompt": "a", "extra_args": {"x": ' + LONG + "}}", "extra_args.x"),
    ('{"prompt": "a", "cache_dit": {"x": ' + LONG + "}}", "cache_dit"),
    ('{"prompt": "a", "extra_args": {"x": ' + "[" * 50 + "]" * 50 + "}}", "extra_args"),
]


@pytest.mark.parametrize(("body", "param"), BODIES, ids=[f"{param} {body[:40]}" for body, param in BODIES])
async def test_a_value_that_no_field_takes_is_a_400_that_names_it(server: Server, body: str, param: str) -> None:
    for path in ("/v1/images/generations", "/v1/videos"):  # whoever reads the body
        answer = await server.post(path, content=body, headers={"Content-Type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["param"] == param
        assert param in error["message"]
    assert server.requests == []


@pytest.mark.parametrize(
    "form",
    [{"seed": LONG}, {"extra_args[x]": LONG}, {"extra_args": '{"x": ' + LONG + "}"}, {"prompt": "a\0"}, {"n": "1e400"}],
    ids=str,
)
async def test_the_same_in_a_form(server: Server, form: dict[str, str]) -> None:
    answer = await server.post("/v1/images/edits", data={"prompt": "a"} | form)
    [name] = form
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(name.partition("[")[0])


ADDRESSES = [
    "/v1/jobs/%00", "/v1/jobs/a%00b/events", "/v1/videos/%00", "/v1/videos/%00/content", "/v1/files/%00",
    "/v1/models/%00", "/v1/jobs/%0d%0aX:%20y", "/v1/jobs?after=%00", "/v1/videos?after=a%00", "/v1/jobs?%00=1",
]  # fmt: skip


async def test_an_address_with_a_control_character_is_a_400_whatever_its_route(server: Server) -> None:
    async with server.client() as client:
        for method, address in product(["GET", "POST", "DELETE"], ADDRESSES):
            answer = await client.request(method, address)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] in ("path", "after", "query")
            assert "control characters" in error["message"]


async def test_a_length_or_a_range_of_thousands_of_digits_is_no_failure(server: Server) -> None:
    async with server.client() as client:
        long = await client.post("/v1/images/generations", content=b"{}", headers={"Content-Length": LONG})
        ranged = await client.get("/v1/files/images/none", headers={"Range": f"bytes=0-{LONG}"})
    assert long.status_code == 413
    assert ranged.status_code == 404
