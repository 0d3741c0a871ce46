"""Sound, in the style of OpenAI's images API: POST /v1/audio/generations."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serve_app.http.answers import Answer, AudioAnswer
from serve_app.http.asked import ASKING_HEADERS
from serve_app.http.by_job import answer_generation
from serve_app.http.context import Context
from serve_app.http.openapi import JOB_ACCEPTED
from serve_app.http.reading import openapi_content, read_body
from serve_app.requests.bodies import AudioGenerationBody
from serve_app.service import Service


def audio_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/audio/generations",
        response_model=AudioAnswer,
        responses={202: JOB_ACCEPTED},
        openapi_extra=ASKING_HEADERS | openapi_content(AudioGenerationBody, files=()),
    )
    async def create_audio(request: Request, context: Context) -> Answer | Response:
        """Sound from a prompt, made by as many parallel generations as `n` says."""
        return await answer_generation(service, context, request, await read_body(request, AudioGenerationBody))

    return router
