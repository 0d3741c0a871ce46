"""Refuses addresses that hold control characters: no id and no key has them, and some stores cannot look for them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ErrorReport
from serve_app.http.errors import error_response

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class PlainAddresses:
    """ASGI middleware: a control character in the path or in a value of the query is a 400."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        part = _part_at_fault(scope) if scope["type"] == "http" else None
        if part is None:
            await self.app(scope, receive, send)
            return
        message = f"{part}: control characters, such as NUL or a line break, are not allowed in an address"
        await error_response(ErrorReport(400, "invalid_request_error", message, "invalid_value", part))(
            scope, receive, send
        )


def _part_at_fault(scope: Scope) -> str | None:
    """`path`, or the name of a value of the query."""
    if _CONTROL.search(scope["path"]):
        return "path"
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return next((_CONTROL.sub("", name) or "query" for name, value in query if _CONTROL.search(name + value)), None)
