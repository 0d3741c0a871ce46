"""Stored outputs: GET /v1/files/..."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from serve_app.http.byte_ranges import file_answer
from serve_app.http.openapi import FILE_ANSWERS
from serve_app.service import Service
from serve_app.storage.base import CONTENT_TYPES
from serve_app.storage.keys import day_of

ANSWERS: dict[int | str, dict[str, Any]] = FILE_ANSWERS | {
    200: {"content": {content_type: {} for content_type in CONTENT_TYPES.values()}}
}


def file_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/files/{key:path}", response_class=Response, responses=ANSWERS)
    async def read_file(request: Request, key: str) -> Response:
        """A stored output, or the ranges of it that are asked for."""
        data, content_type = await service.storage.load(key)
        return file_answer(request.headers, data, content_type, key.rpartition("/")[2], day_of(key))

    return router
