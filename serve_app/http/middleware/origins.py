"""Web pages of others: a browser sends what they ask for without reading the answer, so the server must refuse.

The rule is that of Go's CrossOriginProtection: a page cannot write `Sec-Fetch-Site` or `Origin`, its browser does.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ErrorReport
from serve_app.http.context import RequestContext, context_of
from serve_app.http.errors import error_response

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OWN_PAGES = ("same-origin", "none")  # none: the user typed the address
DEFAULT_PORTS = {"http": 80, "https": 443}


class SameOrigin:
    """ASGI middleware: 403 for what a page of another origin would change here, before a byte of the body is read."""

    def __init__(self, app: ASGIApp, allowed_origins: Collection[str]) -> None:
        self.app = app
        self.allowed_origins = allowed_origins  # "*": all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers, context = Headers(scope=scope), context_of(scope)
            if self._is_of_another_page(headers, context):
                await error_response(_refusal(headers.get("origin")))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_of_another_page(self, headers: Headers, context: RequestContext) -> bool:
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if "*" in self.allowed_origins or origin in self.allowed_origins:
            return False
        if site is not None:
            return site not in OWN_PAGES
        return origin is not None and not _is_same_host(origin, context.asked_at)  # without either: no browser


def _is_same_host(origin: str, asked_at: str) -> bool:
    """The scheme does not count: a proxy may have taken TLS off."""
    try:
        of_page, of_server = urlsplit(origin), urlsplit(asked_at)
        default = DEFAULT_PORTS.get(of_page.scheme)
        page_port = of_page.port or default
        server_port = of_server.port or (default if of_server.scheme in DEFAULT_PORTS else None)
    except ValueError:
        return False
    return of_page.hostname is not None and (of_page.hostname, page_port) == (of_server.hostname, server_port)


def _refusal(origin: str | None) -> ErrorReport:
    page = "a web page of another origin" if origin is None else f"a web page of {origin[:200]!r}"
    message = f"{page} may not change anything here: start the server with its origin in cors_origins"
    return ErrorReport(403, "invalid_request_error", message, "cross_site_request", "Origin")
