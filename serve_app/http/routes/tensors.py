"""Models whose product are numbers, such as the embeddings of a prior: POST /v1/tensors/generations, our own route."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serve_app.http.answers import Answer, MadeAnswer
from serve_app.http.asked import ASKING_HEADERS
from serve_app.http.by_job import answer_generation
from serve_app.http.context import Context
from serve_app.http.openapi import JOB_ACCEPTED
from serve_app.http.reading import openapi_content, read_body
from serve_app.requests.bodies import TensorsGenerationBody
from serve_app.service import Service


def tensor_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/tensors/generations",
        response_model=MadeAnswer,
        responses={202: JOB_ACCEPTED},
        openapi_extra=ASKING_HEADERS | openapi_content(TensorsGenerationBody, files=("image",)),
    )
    async def create_tensors(request: Request, context: Context) -> Answer | Response:
        """One file of tensors for each of `n`, by the names of the fields of the pipeline's output."""
        return await answer_generation(service, context, request, await read_body(request, TensorsGenerationBody))

    return router
