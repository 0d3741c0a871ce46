"""What the middleware knows of one HTTP request, for its route."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from deployments.messages import Media
from serve_app.making.admission import compute_seconds


@dataclass
class RequestContext:
    """Made at the first question, filled in by the middleware, read by the routes."""

    route_prefix: str = ""  # that the application is served under, such as "/flux"; Serve's proxy says it
    asked_at: str = ""  # the scheme, host and port that the caller used, such as "http://127.0.0.1:8000"
    base_url: str = ""  # that, or `public_url`, with the prefix: what URLs of answers begin with
    caller: str = ""  # the label of the API key; "" without keys
    model: str | None = None  # the name of the one that makes what is asked for, once that is known
    body_bytes: int = 0  # of the body, as far as it was read
    started: float = field(default_factory=time.perf_counter)
    compute_s: float | None = None  # None until something was computed
    made: float = 0.0  # time.perf_counter() when all was computed that was to be

    def count_compute(self, media: Iterable[Media]) -> None:
        """The device seconds of what this request had made go into its answer's headers."""
        self.compute_s = (self.compute_s or 0.0) + sum(compute_seconds(each.seconds) for each in media)
        self.made = time.perf_counter()


def context_of(scope: Scope) -> RequestContext:
    """That of the request whose ASGI scope this is."""
    state = scope.setdefault("state", {})
    if "triptych" not in state:
        state["triptych"] = RequestContext(route_prefix=scope.get("root_path", ""))
    context: RequestContext = state["triptych"]
    return context


def _context_of_request(request: Request) -> RequestContext:
    return context_of(request.scope)


Context = Annotated[RequestContext, Depends(_context_of_request)]
