"""Cross-origin requests: refused by browsers unless the application's `cors_origins` allow their origin."""

from __future__ import annotations

from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

SECONDS = ("x-queue-seconds", "x-compute-seconds", "server-timing")
EXPOSED = ("x-request-id", *SECONDS, "retry-after", "openai-poll-after-ms")


class CrossOrigin:
    """ASGI middleware; the origins are arguments of the replica, which begins after the middleware is made."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._allowing: dict[tuple[str, ...], CORSMiddleware] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins: tuple[str, ...] = ()
        if scope["type"] == "http":
            origins = serve.get_replica_context().servable_object.args.cors_origins
        await (self._middleware(origins) if origins else self.app)(scope, receive, send)

    def _middleware(self, origins: tuple[str, ...]) -> CORSMiddleware:
        if origins not in self._allowing:
            self._allowing[origins] = CORSMiddleware(
                self.app,
                allow_origins=list(origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["authorization", "content-type", "idempotency-key", "prefer", "last-event-id"],
                expose_headers=list(EXPOSED),
            )
        return self._allowing[origins]
