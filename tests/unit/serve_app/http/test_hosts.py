"""Under which hosts a server answers, what URLs it gives then, and what pages of others may not do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from pydantic import ValidationError

import serve_app.jobs.webhooks.sender
from serve_app.api_keys import new_key
from serve_app.service import ServiceArgs
from tests.support.in_process import Server, description, serving, until
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video
from tests.support.web_server import web_server

BODY = {"prompt": "x", "response_format": "url"}
GENERATIONS = "/v1/images/generations"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "outputs") as server:
        server.configure(allowed_hosts=())
        yield server


async def ask(
    server: Server,
    method: str = "GET",
    path: str = "/v1/models",
    arrived_at: str = "127.0.0.1",
    peer: tuple[str, int] = ("127.0.0.1", 5000),
    key: str | None = None,
    root_path: str = "",
    **fields: str | list[str],
) -> httpx.Response:
    """`fields` are header fields; the connection is from `peer` to the address `arrived_at`."""
    headers = [
        (name.replace("_", "-"), value)
        for name, values in fields.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    if key:
        headers.append(("authorization", f"Bearer {key}"))
    transport = httpx.ASGITransport(server, client=peer, root_path=root_path)
    address = f"[{arrived_at}]" if ":" in arrived_at else arrived_at
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{address}:8000{root_path}") as client:
        return await client.request(method, path, headers=headers, json=BODY if method == "POST" else None)


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["code"], error["param"]


# --- hosts ---

LOOPBACK = (
    "localhost LOCALHOST localhost:9000 localhost. a.localhost 127.0.0.1 127.1.2.3:80 [::1] [::1]:8000 "
    "[::ffff:127.0.0.1]"
)
FOREIGN = (
    "evil.example evil.example:8000 127.0.0.1.evil.example localhost.evil.example 10.0.0.5 0.0.0.0 2130706433 "
    "[fd00::7] _ -"
)
NO_HOST = [
    *("", "a b", "a/b", "user@127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", "[::1", "[:::]", "[127.0.0.1]"),
    *('"><script>', "a,b"),
]


async def test_a_server_without_keys_answers_to_loopback_hosts(server: Server) -> None:
    for host in LOOPBACK.split():
        assert (await ask(server, host=host)).status_code == 200, host


async def test_it_does_not_answer_to_a_foreign_host(server: Server) -> None:
    for host in FOREIGN.split():
        for method, path in (("GET", "/v1/models"), ("GET", "/docs"), ("POST", GENERATIONS)):
            answer = await ask(server, method, path, host=host)
            assert refusal(answer) == (403, "host_not_allowed", "Host"), host
    assert server.requests == []


async def test_what_is_no_host_is_refused_with_and_without_keys(server: Server, tmp_path: Path) -> None:
    key, line = new_key("a")
    (tmp_path / "keys").write_text(line)
    for args in ({}, {"api_keys_file": tmp_path / "keys"}, {"allowed_hosts": ("*",)}):
        server.configure(**{"allowed_hosts": (), **args})
        for host in NO_HOST:
            answer = await ask(server, host=host, key=key)
            assert refusal(answer) == (400, "invalid_host", "Host"), host
            assert "script" not in answer.text


async def test_two_hosts_are_refused(server: Server) -> None:
    assert refusal(await ask(server, host=["localhost", "evil.example"])) == (400, "invalid_host", "Host")


async def test_a_server_that_listens_elsewhere_answers_to_addresses_but_to_no_name(server: Server) -> None:
    """Probes of Kubernetes ask a pod under its address; a router or a container's host under another."""
    for host in ("10.1.2.3:8000", "192.168.1.7", "[fd00::7]:8000", "localhost"):
        assert (await ask(server, arrived_at="10.1.2.3", host=host)).status_code == 200
    assert (await ask(server, arrived_at="10.1.2.3", host="evil.example")).status_code == 403


async def test_hosts_that_are_allowed_or_of_the_public_url_are_answered(server: Server) -> None:
    server.configure(allowed_hosts=("a.example", "*.b.example", "10.0.0.5"), public_url="https://c.example/pictures")
    for host in ("a.example:8000", "A.EXAMPLE.", "x.b.example", "x.y.b.example", "c.example", "10.0.0.5", "localhost"):
        assert (await ask(server, host=host)).status_code == 200
    for host in ("x.a.example", "b.example", "xb.example", "10.0.0.6"):
        assert (await ask(server, host=host)).status_code == 403
    server.configure(allowed_hosts=("*",))
    assert (await ask(server, host="evil.example")).status_code == 200


async def test_probes_ask_for_health_under_any_host(server: Server) -> None:
    assert (await ask(server, path="/health", host="evil.example")).status_code == 200
    assert (await ask(server, path="/flux/health", root_path="", host="evil.example")).status_code == 403


async def test_a_server_with_keys_answers_to_any_host_unless_some_are_allowed(server: Server, tmp_path: Path) -> None:
    key, line = new_key("a")
    (tmp_path / "keys").write_text(line)
    server.configure(api_keys_file=tmp_path / "keys", allowed_hosts=())
    assert (await ask(server, host="a.example", key=key)).status_code == 200
    server.configure(api_keys_file=tmp_path / "keys", allowed_hosts=("a.example",))
    assert (await ask(server, host="a.example", key=key)).status_code == 200
    assert (await ask(server, host="evil.example", key=key)).status_code == 403


# --- pages of others ---

OTHERS: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"origin": "http://localhost:8000.evil.example"},
    {"origin": "http://[::1"},
    {"origin": "http://localhost"},
    {"origin": "https://evil.example", "sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},
]
OWN: list[dict[str, str]] = [
    {},
    {"origin": "http://localhost:8000"},
    {"origin": "https://localhost:8000"},  # a proxy took TLS off
    {"sec_fetch_site": "none"},
    {"sec_fetch_site": "same-origin", "origin": "http://localhost:8000"},
    {"sec_fetch_site": "same-origin", "origin": "https://public.example"},  # a proxy changed Host, no page can
]


async def test_a_page_of_another_origin_changes_nothing(server: Server) -> None:
    for fields in OTHERS:
        for method, path in (("POST", GENERATIONS), ("POST", "/v1/images/edits"), ("DELETE", "/v1/jobs/x")):
            answer = await ask(server, method, path, host="localhost:8000", **fields)
            assert refusal(answer) == (403, "cross_site_request", "Origin"), fields
        assert (await ask(server, host="localhost:8000", **fields)).status_code == 200  # it cannot read the answer
    assert server.requests == []


async def test_the_own_pages_and_programs_are_let_in(server: Server) -> None:
    for fields in OWN:
        assert (await ask(server, "POST", GENERATIONS, host="localhost:8000", **fields)).status_code == 200, fields


async def test_an_origin_of_the_cors_setting_is_let_in_with_its_preflight(server: Server) -> None:
    server.configure(cors_origins=("https://a.example",), allowed_hosts=())
    fields = {"origin": "https://a.example", "sec_fetch_site": "cross-site"}
    asking = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    assert (await ask(server, "OPTIONS", GENERATIONS, host="localhost:8000", **fields, **asking)).status_code == 200
    answer = await ask(server, "POST", GENERATIONS, host="localhost:8000", **fields)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    other = await ask(server, "POST", GENERATIONS, host="localhost:8000", origin="https://b.example")
    assert other.status_code == 403


# --- absolute URLs ---


async def url_of(server: Server, **asked: Any) -> str:
    answer = await ask(server, "POST", GENERATIONS, **asked)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["url"])


BELIEVED: list[tuple[dict[str, Any], str]] = [
    ({}, "http://localhost:8000"),
    ({"x_forwarded_host": "a.example"}, "http://a.example"),
    ({"x_forwarded_host": "a.example", "x_forwarded_proto": "https"}, "https://a.example"),
    ({"x_forwarded_proto": "https"}, "https://localhost:8000"),
    ({"x_forwarded_host": "evil.example, a.example:8443"}, "http://a.example:8443"),
    ({"forwarded": "for=1.2.3.4;proto=https;host=a.example"}, "https://a.example"),
    ({"forwarded": 'for="[::1]:80", for=1.2.3.4; Host="a.example:444"; proto=HTTPS'}, "https://a.example:444"),
    ({"forwarded": "for=1.2.3.4", "x_forwarded_host": "evil.example"}, "http://localhost:8000"),
    ({"x_forwarded_host": "A.example:443", "x_forwarded_proto": "https"}, "https://a.example"),
]


ASKED = {
    "localhost:8000": "http://localhost:8000",
    "127.0.0.1": "http://127.0.0.1",
    "localhost:80": "http://localhost",
    "[::1]:9000": "http://[::1]:9000",
}


async def test_a_url_begins_with_the_address_that_the_caller_used(server: Server) -> None:
    for host, base in ASKED.items():
        url = await url_of(server, host=host)
        assert url.startswith(f"{base}/v1/files/images/")
        assert (await ask(server, path=httpx.URL(url).path, host=host)).headers["content-type"] == "image/png"


async def test_a_trusted_proxy_says_which_address_that_was(server: Server) -> None:
    proxies = (
        ("10.0.0.0/8", ("10.0.0.9", 5000)),
        ("::1", ("::1", 5000)),
        ("127.0.0.1", ("203.0.113.7", 0)),  # uvicorn has put the address of X-Forwarded-For in the place of the proxy's
    )
    for proxy, peer in proxies:
        server.configure(trusted_proxies=(proxy,), allowed_hosts=("a.example",))
        for fields, base in BELIEVED:
            url = await url_of(server, peer=peer, host="localhost:8000", **fields)
            assert url.startswith(f"{base}/v1/files/"), (proxy, fields)


async def test_nobody_else_says_it(server: Server) -> None:
    server.configure(trusted_proxies=("10.0.0.9/32",), allowed_hosts=())
    for fields, _ in BELIEVED:
        for peer in (("10.0.0.8", 5000), ("127.0.0.1", 5000), ("203.0.113.7", 0)):
            url = await url_of(server, peer=peer, host="localhost:8000", **fields)
            assert url.startswith("http://localhost:8000/v1/files/"), fields


async def test_the_host_that_a_trusted_proxy_names_is_checked_like_any(server: Server) -> None:
    server.configure(trusted_proxies=("10.0.0.0/8",), allowed_hosts=())
    answer = await ask(server, peer=("10.0.0.9", 5000), host="localhost:8000", x_forwarded_host="evil.example")
    assert refusal(answer)[:2] == (403, "host_not_allowed")
    answer = await ask(server, peer=("10.0.0.9", 5000), host="localhost:8000", x_forwarded_host="a b")
    assert refusal(answer)[:2] == (400, "invalid_host")


async def test_the_public_url_is_what_urls_begin_with_whoever_asks(server: Server) -> None:
    server.configure(public_url="https://c.example/pictures/", allowed_hosts=())
    assert (await url_of(server, host="localhost:8000")).startswith("https://c.example/pictures/v1/files/")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("public_url", "example.com"),
        ("public_url", "ftp://example.com"),
        ("public_url", "https://example.com/?x=1"),
        ("public_url", "https://exa mple.com"),
        ("allowed_hosts", ["example.com:8000"]),
        ("allowed_hosts", ["https://example.com"]),
        ("allowed_hosts", ["a.*.example"]),
        ("trusted_proxies", ["proxy.example"]),
        ("trusted_proxies", ["10.0.0.1/8"]),
        ("cors_origins", ["https://example.com/"]),
        ("cors_origins", ["example.com"]),
    ],
)
def test_an_argument_that_could_never_fit_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{name}(.|\n)*must be"):
        ServiceArgs.model_validate({name: value})


async def test_a_job_gives_the_same_urls_to_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object, its events, the list and the webhook; also under another host than it was asked for."""

    async def take(request: web.Request) -> web.Response:
        told.append(await request.json())
        return web.Response()

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(serve_app.jobs.webhooks.sender, "PAUSE_S", 0.02)
    (tmp_path / "secret").write_text("secret")
    args = {"jobs": {"webhook_secret": {"file": str(tmp_path / "secret")}}, "private_targets": True}
    video = description("WanPipeline", "num_frames", media_kind="video")
    async with (
        web_server(take) as hook,
        server_with_jobs(tmp_path, describing=video, allowed_hosts=("test", "a.example"), **args) as (server, client),
    ):
        server.make = make_video
        body = {"prompt": "x", "webhook_url": hook}
        job = (await client.post("/v1/videos", json=body, headers={"host": "a.example"})).json()
        done = await ended(client, job["id"])
        [url] = [item["url"] for item in done["result"]["data"]]
        assert url.startswith("http://a.example/v1/files/videos/")
        events = (await client.get(f"/v1/jobs/{job['id']}/events")).text
        last = json.loads(events.strip().rpartition("data: ")[2])
        listed = (await client.get("/v1/videos")).json()["data"][0]["urls"]
        await until(lambda: bool(told))
        assert [last["urls"], listed, told[0]["data"]["urls"]] == [[url], [url], [url]]
