"""What an attacker tries and what happens; docs/safety.md has a row for each test, which a test ensures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from PIL import Image

import serve_app.outbound
from serve_app.http.middleware.limits import BodySizeLimit
from serve_app.jobs.webhooks.delivery import WebhookRules, deliver
from serve_app.outbound import CheckedResolver, ForbiddenTargetError, checked_url
from serve_app.requests.input_pictures import PictureRules
from serve_app.requests.limits import RequestLimits
from tests.support.in_process import Server, description, picture, serving
from tests.support.web_server import web_server

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "safety.md"
EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
KONTEXT = description("FluxKontextPipeline", "image", tasks=("text_to_image", "image_to_image"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "outputs") as server:
        server.configure(KONTEXT, remote_images=True)
        yield server


refusing_only = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that are `refusing_only`: it keeps nothing of what it refuses."""
    with serving(tmp_path_factory.mktemp("refusing") / "outputs") as server:
        server.configure(KONTEXT, remote_images=True)
        yield server


def allow_only(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Take these addresses for public ones: no test can reach a real one."""
    real = serve_app.outbound.is_public
    monkeypatch.setattr(serve_app.outbound, "is_public", lambda each: str(each) in addresses or real(each))


async def edit_from(server: Server, url: str) -> httpx.Response:
    return await server.post(EDITS, json={"prompt": "x", "image": url})


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- server-side request forgery ---

INSIDE = (
    "127.0.0.1 127.1.2.3 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 "
    "255.255.255.255 192.0.2.1 198.18.0.1 [::1] [::] [fe80::1] [fc00::1] [ff02::1] [::ffff:127.0.0.1] "
    "[::ffff:10.0.0.1] [64:ff9b::7f00:1] [64:ff9b::a9fe:a9fe] [2002:7f00:1::] [2001:db8::1] "
    "[2001:0:4136:e378:8000:63bf:80ff:fffe] "
    "168.63.129.16 192.0.0.192 [fec0::1] [64:ff9b:1::808:808] [::7f00:1]"
)
UNUSUAL = "2130706433 127.1 0177.0.0.1 127.0.0.1. 0x7f000001 0x7f.1 ①②⑦.⓪.⓪.① １２７.0.0.1 localhost"


@refusing_only
@pytest.mark.parametrize("host", INSIDE.split())
async def test_an_address_inside_is_not_fetched(refusing, host):
    error = refusal(await edit_from(refusing, f"http://{host}:1/x.png"))
    assert (error["param"], error["code"]) == ("image", "invalid_value")
    assert "not fetched" in error["message"]
    assert refusing.requests == []


@refusing_only
@pytest.mark.parametrize("host", UNUSUAL.split())
async def test_an_address_inside_in_an_unusual_notation_is_not_fetched(refusing, host):
    async def secret(_: web.Request) -> web.Response:
        reached.append(host)
        return web.Response(body=picture())

    reached: list[str] = []
    async with web_server(secret) as url:
        port = url.rpartition(":")[2]
        refusal(await edit_from(refusing, f"http://{host}:{port}/x.png"))
    assert reached == []


@refusing_only
@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/x.png", "gopher://127.0.0.1/", "HTTP:", "http://", "http://[::1"]
)
async def test_another_scheme_or_no_url_is_refused(refusing, url):
    refusal(await edit_from(refusing, url))
    with pytest.raises(ForbiddenTargetError):
        checked_url(url, allow_private=False)


def test_a_url_with_a_password_is_refused():
    with pytest.raises(ForbiddenTargetError, match="password"):
        checked_url("http://user:password@example.com/", allow_private=True)


async def test_a_name_with_one_address_inside_is_forbidden(monkeypatch):
    answers = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80)),
    ]

    async def look_up(*_: Any, **__: Any) -> Any:
        return answers

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    with pytest.raises(ForbiddenTargetError):
        await CheckedResolver(allow_private=False).resolve("rebinding.example", 80)
    answers.pop()
    [found] = await CheckedResolver(allow_private=False).resolve("rebinding.example", 80)
    assert found["host"] == "93.184.216.34"


async def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch):
    """DNS rebinding: the second look-up of a name would lead inside, so there is none."""
    look_ups = 0

    async def look_up(host: str, port: int, **_: Any) -> Any:
        nonlocal look_ups
        look_ups += 1
        address = "127.0.0.1" if look_ups == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def answer(request: web.Request) -> web.Response:
        hosts.append(request.host)
        return web.Response(body=picture())

    hosts: list[str] = []
    allow_only(monkeypatch, "127.0.0.1")
    async with web_server(answer) as url:
        port = url.rpartition(":")[2]
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        assert (await edit_from(server, f"http://pictures.example:{port}/x.png")).status_code == 200
    assert (look_ups, hosts) == (1, [f"pictures.example:{port}"])


@pytest.mark.parametrize("target", ["http://127.0.0.2:{port}/", "http://169.254.169.254/latest", "file:///etc/passwd"])
async def test_a_redirect_to_the_inside_is_not_followed(server, monkeypatch, target):
    async def redirect(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPFound(target.format(port=request.url.port))

    asked: list[str] = []
    allow_only(monkeypatch, "127.0.0.1")
    async with web_server(redirect) as url:
        assert "not fetched" in refusal(await edit_from(server, f"{url}/x.png"))["message"]
    assert asked == ["/x.png"]


async def test_redirects_end(server, monkeypatch):
    async def around(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPFound("/x.png")

    asked: list[str] = []
    allow_only(monkeypatch, "127.0.0.1")
    async with web_server(around) as url:
        refusal(await edit_from(server, f"{url}/x.png"))
    assert len(asked) == 4


async def test_pictures_are_fetched_only_where_the_application_allows_it(server):
    server.configure(KONTEXT)
    assert refusal(await edit_from(server, "https://example.com/x.png"))["code"] == "not_supported"


async def test_a_public_picture_is_fetched_also_through_a_redirect(server, monkeypatch):
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/moved":
            raise web.HTTPFound("/x.png")
        return web.Response(body=picture(48, 32))

    allow_only(monkeypatch, "127.0.0.1")
    async with web_server(answer) as url:
        assert (await edit_from(server, f"{url}/moved")).status_code == 200
    assert server.requests[0].arguments["image"].data == picture(48, 32)


async def test_a_fetched_file_that_is_too_large_is_not_read_to_its_end(server):
    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"\x89PNG" * 4096)
            sent += 16384

    sent = 0
    server.configure(KONTEXT, pictures=PictureRules(RequestLimits(max_input_bytes=100_000), True, True))
    async with web_server(endless) as url:
        error = refusal(await edit_from(server, url))
    assert error["code"] == "limit_exceeded"
    assert sent < 10_000_000


async def test_a_host_that_does_not_answer_is_given_up(server):
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    server.configure(KONTEXT, pictures=PictureRules(RequestLimits(), True, True, timeout_s=0.2))
    async with web_server(never) as url:
        assert "no file could be fetched" in refusal(await edit_from(server, url))["message"]


@pytest.mark.parametrize("status", [204, 404, 500])
async def test_what_is_found_at_an_address_is_not_told(server, status):
    async def secret(_: web.Request) -> web.Response:
        return web.Response(status=status, text="root:x:0:0" if status != 204 else None)

    server.configure(KONTEXT, pictures=PictureRules(RequestLimits(), True, True))
    async with web_server(secret) as url:
        message = refusal(await edit_from(server, url))["message"]
    nobody = refusal(await edit_from(server, "http://127.0.0.1:1/x.png"))["message"]
    assert message == nobody == "image: no file could be fetched from its URL"


async def test_a_fetched_page_is_no_picture(server):
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>root:x:0:0</html>", content_type="image/png")

    server.configure(KONTEXT, pictures=PictureRules(RequestLimits(), True, True))
    async with web_server(page) as url:
        assert "root" not in refusal(await edit_from(server, url))["message"]


async def test_a_webhook_to_the_inside_is_not_sent():
    async def take(_: web.Request) -> web.Response:
        taken.append(1)
        return web.Response()

    taken: list[int] = []
    async with web_server(take) as url:
        assert await deliver(url, "secret", {}, WebhookRules(), "wh_1") == "refused"
        assert await deliver(url.replace("127.0.0.1", "localhost"), "secret", {}, WebhookRules(), "wh_1") == "refused"
    assert taken == []


# --- bombs ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of less than 100 KB, one bit a pixel and all black, that unpacks to as many pixels as Pillow asks for."""
    pixels = zlib.compress(bytes(min(1 + width // 8, 10_000) * min(height, 1000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [5_000, 15_000, 60_000, 2**31 - 1])
async def test_a_picture_that_unpacks_to_too_many_pixels_is_refused_unread(server, side):
    data = png_that_claims(side, side)
    assert len(data) < 100_000
    error = refusal(await server.post(EDITS, data={"prompt": "x"}, files={"image": ("x.png", data)}))
    assert (error["param"], error["code"]) == ("image", "limit_exceeded")
    assert server.requests == []


async def test_a_picture_whose_text_unpacks_to_100_megabytes_is_refused(server):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    data = file.getvalue()
    bomb = data[:33] + chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(100_000_000), 1)) + data[33:]
    error = refusal(await server.post(EDITS, data={"prompt": "x"}, files={"image": ("x.png", bomb)}))
    assert error["param"] == "image"


async def test_a_compressed_body_is_not_unpacked(server):
    bomb = zlib.compress(b" " * 10_000_000)
    answer = await server.post(
        EDITS, content=bomb, headers={"content-type": "application/json", "content-encoding": "deflate"}
    )
    assert refusal(answer)["code"] in ("invalid_json", "invalid_body")


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + b"\0" * 50, b"RIFF\xff\xff\xff\xffWEBPVP8 "])
async def test_a_broken_picture_is_refused(server, data):
    error = refusal(await server.post(EDITS, data={"prompt": "x"}, files={"image": ("x", data)}))
    assert error["param"] == "image"


async def test_a_body_nested_too_deeply_is_refused(server):
    closed = b'{"extra_args":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    for path in (EDITS, GENERATIONS):
        for deep in (b"[" * 500_000, b'{"a":' * 500_000, closed):
            answer = await server.post(path, content=deep, headers={"content-type": "application/json"})
            assert refusal(answer)["type"] == "invalid_request_error"


# --- bodies that are too large or too slow ---


async def send(server: Server, body: Any, **headers: str) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=x", **headers}
    return await server.post(EDITS, content=body, headers=headers)


async def test_an_oversized_form_is_refused_and_not_read_to_its_end(server):
    read = 0

    async def form() -> AsyncIterator[bytes]:
        nonlocal read
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
        for _ in range(1000):
            read += 1_000_000
            yield b"x" * 1_000_000

    server.configure(limits=RequestLimits(max_body_bytes=5_000_000))
    assert refusal(await send(server, form()), 413)["code"] == "request_too_large"
    assert read <= 7_000_000


async def test_a_form_that_announces_too_much_is_refused_at_once(server):
    read = 0

    async def form() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"--x"

    answer = await send(server, form(), **{"content-length": "99999999999"})
    assert refusal(answer, 413)["code"] == "request_too_large"
    assert read == 0


@pytest.mark.parametrize("part", ['name="a"', 'name="a"; filename="f"'])
async def test_a_form_with_thousands_of_parts_is_refused(server, part):
    body = f"--x\r\nContent-Disposition: form-data; {part}\r\n\r\n1\r\n".encode() * 5000 + b"--x--\r\n"
    assert refusal(await send(server, body))["type"] == "invalid_request_error"


async def test_a_body_that_trickles_is_given_up():
    asgi = BodySizeLimit(_reads_the_body, max_body_s=0.3, max_pause_s=0.1)

    async def run(pause_s: float, pieces: int) -> Any:
        async def receive() -> Any:
            nonlocal pieces
            await asyncio.sleep(pause_s)
            pieces -= 1
            return {"type": "http.request", "body": b"x", "more_body": pieces > 0}

        scope = {"type": "http", "headers": []}
        await asgi(scope, receive, _ignore)

    await run(0.01, 5)
    for pause_s, pieces in ((1.0, 2), (0.05, 1000)):
        with pytest.raises(Exception, match="408"):
            await run(pause_s, pieces)


async def _reads_the_body(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass


async def _ignore(_: Any) -> None: ...


# --- names and paths ---

LINES = ["x\r\nSet-Cookie: a=b", "x%0d%0aSet-Cookie: a=b"]
NAMES = ["../../../etc/passwd", "/etc/passwd", *LINES, "a" * 10_000, "\0", "😈"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_the_name_of_an_uploaded_file_goes_nowhere(server, name, tmp_path):
    disposition = f'Content-Disposition: form-data; name="image"; filename="{name}"'.encode()
    body = (
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
        b'--x\r\nContent-Disposition: form-data; name="response_format"\r\n\r\nurl\r\n'
        b"--x\r\n" + disposition + b"\r\n\r\n" + picture() + b"\r\n--x--\r\n"
    )
    answer = await send(server, body)
    if answer.status_code == 200:
        assert re.fullmatch(
            r"http://test/v1/files/images/\d{4}/\d\d/\d\d/[0-9a-f]{32}-0\.png", answer.json()["data"][0]["url"]
        )
    else:
        assert "Set-Cookie" not in refusal(answer)["message"]
    assert "set-cookie" not in answer.headers
    files = [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()]
    assert {place for place in files if place[0] != "outputs-cache"} <= {("outputs", "images")}


@refusing_only
@pytest.mark.parametrize(
    "path",
    [
        "../secret", "..%2fsecret", "%2e%2e/secret", "images/../../secret", "images/2026/11/21/../../../../../secret",
        "/etc/passwd", "images/2026/11/21/x-0.png%00", "images/2026/11/21/x-0.png%0d%0aSet-Cookie:a", "%5c..%5csecret",
    ],
)  # fmt: skip
async def test_a_file_outside_of_the_outputs_cannot_be_read(refusing, path):
    refusing.folder.with_name("secret").write_text("secret")
    async with refusing.client() as client:
        answer = await client.get(f"/v1/files/{path}")
    assert answer.status_code in (400, 404, 307)
    assert "set-cookie" not in answer.headers
    assert answer.text != "secret"


@refusing_only
@pytest.mark.parametrize("field", ["output_path", "file_path", "perf_dump_path", "video_path", "path"])
async def test_no_field_names_a_path_of_the_server(refusing, field):
    assert refusal(await refusing.post(GENERATIONS, json={"prompt": "x", field: "/etc/x"}))["param"] == field


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: a=b", "\ud800", "x" * 100_000])
async def test_a_value_is_repeated_neither_in_headers_nor_at_length(server, value):
    for field in ("size", "model", "output_format", value):
        data = base64.b64encode(picture()).decode()
        content = {"prompt": "x", "image": data, field: value}
        body = json.dumps(content).encode()
        answer = await server.post(EDITS, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404)
        assert "set-cookie" not in answer.headers
        assert len(answer.content) < 2_000


async def test_an_unexpected_error_tells_nothing_of_the_inside(server):
    async def fail(_: Any) -> Any:
        raise RuntimeError("password=1234 in /srv/app.py")

    server.make = fail
    answer = await server.post(EDITS, json={"prompt": "x", "image": base64.b64encode(picture()).decode()})
    assert refusal(answer, 500)["code"] == "internal_error"
    assert "1234" not in answer.text
    assert "/srv" not in answer.text


# --- the document ---


BESIDE = ("own_arguments", "hosts", "lora_routes", "loras_in_requests", "plain_values", "video_edit_routes")


def test_the_document_names_each_of_these_tests_and_none_that_there_is_not() -> None:
    named = re.findall(r"`(test_\w+)`", DOCUMENT.read_text(encoding="utf-8"))
    here = {name for name in globals() if name.startswith("test_") and "document" not in name}
    unit = Path(__file__).parents[1]
    beside = [
        unit / "making/test_admission.py",
        *(unit / f"http/test_{name}.py" for name in BESIDE),
        unit / "adapters/test_places.py",
        unit / "test_proxy.py",
        unit.parent / "env_config/test_secret.py",
        unit.parent / "deployments/test_input_pictures.py",
        unit.parents[1] / "fuzz/test_hostile_requests.py",
    ]
    elsewhere = {name for file in beside for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    assert len(named) == len(set(named))
    assert here <= set(named) <= here | elsewhere
