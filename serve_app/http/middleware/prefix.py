"""The prefix that the application is served under (`route_prefix` in Serve's config file), for URLs in answers."""

from __future__ import annotations

from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

route_prefix: ContextVar[str] = ContextVar("route_prefix", default="")  # of the request at hand, such as "/flux"


class KnowRoutePrefix:
    """ASGI middleware: Serve's proxy says the prefix with each request, so it may change while this replica lives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            route_prefix.set(scope.get("root_path", ""))
        await self.app(scope, receive, send)


def under_prefix(url: str) -> str:
    """A path of this server as the caller of the request at hand reaches it; a whole URL stays as it is."""
    return f"{route_prefix.get()}{url}" if url.startswith("/") else url
