"""The HTTP application, made from a Service and two tables: what surrounds every request, and the routes."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import tracing
from env_config.own_version import own_version
from serve_app.http.errors import install_error_handlers
from serve_app.http.middleware.addresses import PlainAddresses
from serve_app.http.middleware.counting import CountRequests
from serve_app.http.middleware.head import AnswerHead
from serve_app.http.middleware.hosts import HostRules, KnownHosts
from serve_app.http.middleware.keys import OPEN_PATHS, RequireApiKey
from serve_app.http.middleware.limits import BodySizeLimit, RoomForRequests
from serve_app.http.middleware.origins import SameOrigin
from serve_app.http.middleware.timing import AnswerHeaders
from serve_app.http.middleware.traces import TRACE_HEADERS, Traces
from serve_app.http.openapi import describe_truly
from serve_app.http.playground.routes import open_paths, page_routes
from serve_app.http.routes.audio import audio_routes
from serve_app.http.routes.dev import dev_routes
from serve_app.http.routes.files import file_routes
from serve_app.http.routes.images import image_routes
from serve_app.http.routes.jobs import job_routes
from serve_app.http.routes.loras import lora_routes
from serve_app.http.routes.models import model_routes
from serve_app.http.routes.tensors import tensor_routes
from serve_app.http.routes.video_edits import video_edit_routes
from serve_app.http.routes.videos import video_routes
from serve_app.service import Service

CONDITIONS = ("range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
PARTS = ("accept-ranges", "content-range", "etag")  # what says of a file which part it is
SECONDS = ("x-queue-seconds", "x-compute-seconds", "server-timing")

ASKING = ("idempotency-key", "prefer", "cancel-after", "x-request-start-timeout")
ANSWERING = ("location", "preference-applied", "x-should-retry")


def known_hosts(service: Service) -> Middleware:
    """Hosts are checked where no key is asked for, or `allowed_hosts` are given."""
    args = service.args
    are_checked = service.keys is None or bool(args.allowed_hosts)
    return Middleware(
        KnownHosts, rules=HostRules(are_checked, args.allowed_hosts, args.public_url, args.trusted_proxies)
    )


def same_origin(service: Service) -> Middleware | None:
    """With keys a page of others can do nothing: it has none."""
    return None if service.keys else Middleware(SameOrigin, allowed_origins=service.args.cors_origins)


def cross_origin(service: Service) -> Middleware | None:
    """Browsers refuse cross-origin requests unless `cors_origins` allow their origin."""
    if not service.args.cors_origins:
        return None
    return Middleware(
        CORSMiddleware,
        allow_origins=list(service.args.cors_origins),
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", *ASKING, *TRACE_HEADERS, "last-event-id", *CONDITIONS],
        expose_headers=["x-request-id", *SECONDS, "retry-after", "openai-poll-after-ms", *ANSWERING, *PARTS],
    )


def api_keys(service: Service) -> Middleware | None:
    if service.keys is None:
        return None
    return Middleware(RequireApiKey, keys=service.keys, open_paths=(*OPEN_PATHS, *open_paths(service)))


MakeMiddleware = Callable[[Service], Middleware | None]  # None: it is off
MakeRoutes = Callable[[Service], APIRouter | None]  # None: they are off

# The first is the outermost.
MIDDLEWARE: tuple[MakeMiddleware, ...] = (
    lambda service: Middleware(Traces) if tracing.is_on() else None,
    lambda service: Middleware(CountRequests, meter=service.meter),
    lambda service: Middleware(AnswerHeaders),
    known_hosts,
    same_origin,
    cross_origin,
    lambda service: Middleware(RoomForRequests, overloaded=service.models.overloaded, meter=service.meter),
    api_keys,
    lambda service: Middleware(PlainAddresses),
    lambda service: Middleware(BodySizeLimit, max_body_bytes=service.models.max_body_bytes, meter=service.meter),
    lambda service: Middleware(AnswerHead),
)

# One family of routes each.
ROUTERS: tuple[MakeRoutes, ...] = (
    image_routes,
    video_edit_routes,
    video_routes,
    audio_routes,
    tensor_routes,
    job_routes,
    model_routes,
    lora_routes,
    file_routes,
    dev_routes,
    page_routes,
)


class PlainASGI:
    """An application with nothing but what ASGI asks for, and what Serve names its metrics by: routes and router.

    Serve puts handlers of its own for its errors into an application that has `add_exception_handler`.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.routes: list[BaseRoute] = app.routes
        self.router = app.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def http_app(
    service: Service,
    middleware: tuple[MakeMiddleware, ...] = MIDDLEWARE,
    routers: tuple[MakeRoutes, ...] = ROUTERS,
) -> ASGIApp:
    """The application that answers for `service`."""
    app = FastAPI(
        title="Triptych",
        description="Diffusion models on Ray Serve, spoken to as OpenAI's API.",
        version=own_version(),
        middleware=[made for row in middleware if (made := row(service)) is not None],
    )
    install_error_handlers(app)
    describe_truly(app, service)
    for row in routers:
        if (router := row(service)) is not None:
            app.router.routes.extend(router.routes)  # as they are: `include_router` makes each of them once more
    return PlainASGI(app)
