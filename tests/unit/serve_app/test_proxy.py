"""Connections to Serve's proxy that send no request, half of one, or headers without end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
import uvicorn.config
from starlette.types import Receive, Scope, Send

import serve_app.proxy
from serve_app.proxy import close_silent_connections
from tests.support.in_process import until

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
TIMEOUT_S = 0.1
LONGER_S = 3 * TIMEOUT_S

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole body, waits for longer than headers may take, and answers."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(LONGER_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Of an HTTP server as Serve starts it in its proxies."""
    monkeypatch.setattr(serve_app.proxy, "HEADERS_S", TIMEOUT_S)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    close_silent_connections()
    config = uvicorn.Config(lambda: slow_app, factory=True, lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server._serve([listener]))
        await until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ends(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 30) == b""
    return True


async def answer(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"ok"), 30)


@pytest.mark.parametrize("sent", [b"", b"G", REQUEST[:-2], REQUEST[:20]])
async def test_a_connection_without_a_whole_request_is_closed(port: int, sent: bytes) -> None:
    async with connection(port) as (reader, writer):
        writer.write(sent)
        assert await ends(reader)


async def test_headers_that_trickle_or_have_no_end_are_not_read_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"a: b\r\n")
            await asyncio.sleep(TIMEOUT_S / 10)

    async with connection(port) as (reader, writer):
        writer.write(REQUEST[:-2])
        trickling = asyncio.create_task(trickle(writer))
        assert await ends(reader)
        trickling.cancel()
    monkeypatch.setattr(serve_app.proxy, "HEADERS_S", 3600)
    async with connection(port) as (reader, writer):
        writer.write(REQUEST[:-2] + b"a: b\r\n" * 20_000)
        assert await ends(reader)


async def test_half_a_request_after_a_whole_one_is_not_waited_for(port: int) -> None:
    async with connection(port) as (reader, writer):
        writer.write(REQUEST)
        await answer(reader)
        await asyncio.sleep(LONGER_S)  # between requests the connection may rest
        writer.write(REQUEST)
        await answer(reader)
        writer.write(REQUEST[:10])
        assert await ends(reader)


async def test_a_slow_body_and_a_slow_answer_are_waited_for(port: int) -> None:
    async with connection(port) as (reader, writer):
        writer.write(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\na")
        await asyncio.sleep(LONGER_S)
        writer.write(b"b")
        assert (await answer(reader)).startswith(b"HTTP/1.1 200")
