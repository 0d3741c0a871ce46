"""Stored outputs: GET /v1/files/..."""

from __future__ import annotations

from fastapi import APIRouter, Response

from serve_app.service import Service


def file_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/files/{key:path}")
    async def read_file(key: str) -> Response:
        """A stored output."""
        data, content_type = await service.storage.load(key)
        return Response(data, media_type=content_type)

    return router
