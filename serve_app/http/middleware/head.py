"""HEAD, on every route that has GET: the same headers, without the content."""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AnswerHead:
    """ASGI middleware: a HEAD is a GET that ends where its content would begin.

    A route that streams is left there, so that HEAD of a job's events does not wait for the job's end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._answer_head(scope, receive, send)
        else:
            await self.app(scope, receive, _naming_head(send))

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A range is for GET alone (RFC 9110, section 14.2).
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        is_answered = asyncio.Event()

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await _naming_head(send)(message)
                await send({"type": "http.response.body", "body": b""})
                is_answered.set()

        asked = {**scope, "method": "GET", "headers": headers}
        answering = asyncio.ensure_future(self.app(asked, receive, send_head))
        answered = asyncio.ensure_future(is_answered.wait())
        try:
            await asyncio.wait({answering, answered}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            if "route" in asked:  # the middleware around this one counts and traces by it
                scope["route"] = asked["route"]
            answering.cancel()
            answered.cancel()
            await asyncio.gather(answering, answered, return_exceptions=True)


def _naming_head(send: Send) -> Send:
    """`Allow` of a 405 names HEAD where it names GET."""

    async def send_and_name(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 405:
            headers = MutableHeaders(scope=message)
            allowed = [each.strip() for each in headers.get("allow", "").split(",")]
            if "GET" in allowed and "HEAD" not in allowed:
                headers["allow"] = ", ".join([*allowed, "HEAD"])
        await send(message)

    return send_and_name
