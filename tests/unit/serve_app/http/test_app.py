"""The HTTP application is two tables: what a planted row adds, and that it needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter
from ray.serve._private.thirdparty.get_asgi_route_name import extract_route_patterns, get_asgi_route_name
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.app import MIDDLEWARE, ROUTERS, http_app
from serve_app.service import Service
from tests.support.in_process import serving


def planted_routes(service: Service) -> APIRouter:
    """A family of routes as one file would hold it."""
    router = APIRouter()

    @router.get("/v1/planted")
    async def read_planted() -> dict[str, str]:
        return {"model": service.models.all()[0].name}

    return router


class PlantedHeader:
    """A middleware as one file would hold it: a header on every answer."""

    def __init__(self, app: ASGIApp, value: str) -> None:
        self.app = app
        self.value = value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-planted", self.value.encode()))
            await send(message)

        await self.app(scope, receive, send_with_header)


def planted_header(service: Service) -> Middleware:
    return Middleware(PlantedHeader, value=service.models.all()[0].name)


async def test_a_row_adds_a_family_of_routes_and_another_a_header_to_every_answer(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        await server.open()
        app = http_app(server.service, (planted_header, *MIDDLEWARE), (*ROUTERS, planted_routes))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.get("/v1/planted")
            assert (answer.status_code, answer.json()) == (200, {"model": "flux"})
            assert "/v1/planted" in (await client.get("/openapi.json")).json()["paths"]
            for path in ("/v1/models", "/nothing"):
                assert (await client.get(path)).headers["x-planted"] == "flux"


async def test_serve_names_its_metrics_by_our_routes(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        app: Any = await server.open()
    assert "/v1/videos/{video_id}/content" in {pattern.path for pattern in extract_route_patterns(app)}
    scope = {"type": "http", "method": "GET", "path": "/nothing", "headers": []}
    assert get_asgi_route_name(app, scope) is None


async def test_the_dev_routes_are_there_in_dev_mode_only(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        async with server.client() as client:
            assert (await client.get("/dev")).status_code == 404
        server.configure()
        server.environment = {"runtime": {"server_dev_mode": True}}
        async with server.client() as client:
            routes = (await client.get("/dev")).json()
    assert "GET /dev/replicas" in routes
