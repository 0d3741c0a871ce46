"""Counts HTTP requests and their seconds, by route and by how they ended."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.metrics.meter import Meter
from deployments.metrics.metric import hashed
from serve_app.http.context import context_of


class CountRequests:
    """ASGI middleware, the outermost: it sees what the others refuse too."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self.app = app
        self.meter = meter
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context, began, status = context_of(scope), time.perf_counter(), 0

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._change(1)
        try:
            await self.app(scope, receive, send_and_look)
        except Exception:
            status = status or 500  # Serve answers
            raise
        finally:
            self._change(-1)
            route, outcome = route_of(scope), f"{status // 100}xx" if status else "hung_up"
            seconds = time.perf_counter() - began
            self.meter.count("triptych_requests_total", route=route, outcome=outcome, status=str(status or "none"))
            self.meter.observe("triptych_request_seconds", seconds, route=route, outcome=outcome)
            self.meter.count("triptych_key_requests_total", key=hashed(context.caller), outcome=outcome)
            if context.model is not None:
                self.meter.count("triptych_model_requests_total", model=context.model, outcome=outcome)

    def _change(self, by: int) -> None:
        self.num_open += by
        self.meter.set("triptych_requests_open", self.num_open)


def route_of(scope: Scope) -> str:
    """The route that answered, such as /v1/videos/{video_id}; "unrouted" where none did."""
    path: str = getattr(scope.get("route"), "path", "unrouted")
    return path
