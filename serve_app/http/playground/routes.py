"""`GET /`, the page; `GET /ui/...`, its files; `GET /ui/cluster`, what the cluster does, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from serve_app.http.byte_ranges import has_file
from serve_app.http.playground.cluster import ClusterWatch
from serve_app.http.playground.files import HEADERS, INDEX, PageFile, page_files
from serve_app.http.sse import KEEP_ALIVE, sse_event
from serve_app.http.streaming import event_stream
from serve_app.service import Service

FILES = page_files()
# Sent without a key, as it is asked for there. Nothing in them is of this server, but that it serves a page.
OPEN_PATHS = ("", "/", *(f"/ui/{name}" for name in FILES))


def open_paths(service: Service) -> tuple[str, ...]:
    """What may be read without a key; nothing where the page is off."""
    return OPEN_PATHS if service.args.playground else ()


def page_routes(service: Service) -> APIRouter | None:
    """None with `playground: false`: then each of them is a route that does not exist."""
    if not service.args.playground:
        return None
    router = APIRouter(include_in_schema=False)
    watch = ClusterWatch(service.models, service.jobs)

    @router.get("/")
    async def read_page(request: Request) -> Response:
        """The page; all that it refers to is relative to its address, which may have a prefix."""
        return _answer(request, FILES[INDEX])

    @router.get("/ui/cluster")
    async def follow_cluster() -> StreamingResponse:
        """A `cluster` event a second for some time; whoever wants more asks again."""
        watching = watch.watch()  # raises OverloadedError before the answer has begun

        async def events() -> AsyncIterator[bytes]:
            async for seen in watching:
                yield KEEP_ALIVE if seen is None else sse_event("cluster", seen)

        return event_stream(events())

    @router.get("/ui/{name:path}")
    async def read_page_file(request: Request, name: str) -> Response:
        file = FILES.get(name)
        if file is None:
            raise HTTPException(404, "the page has no such file")
        return _answer(request, file)

    return router


def _answer(request: Request, file: PageFile) -> Response:
    headers = HEADERS | {"ETag": file.tag}
    if has_file(request.headers, file.tag):
        return Response(status_code=304, headers=headers)
    return Response(file.data, headers=headers, media_type=file.content_type)
