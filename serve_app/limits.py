"""What one request may ask for at most: `RequestLimits` of its values, `BodySizeLimit` of its bytes."""

from __future__ import annotations

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 25_000_000


class RequestLimits(BaseModel):
    """Bounds of a request's values; the checks of serve_app.schemas name the one that was passed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_images: int = Field(10, ge=1, description="pictures or videos per request: the bound of `n`")
    max_pixels: int = Field(4_194_304, ge=1, description="width x height")
    max_side: int = Field(8_192, ge=1, le=16_383, description="width, height; a WebP file ends at 16 383")
    max_frames: int = Field(257, ge=1, description="frames of a video")
    max_steps: int = Field(200, ge=1, description="num_inference_steps, and the length of a list of timesteps")
    max_prompt_chars: int = Field(20_000, ge=1, description="characters of each text")
    max_input_images: int = Field(8, ge=1, description="pictures sent along in one field")


class BodySizeLimit:
    """ASGI middleware: a body of more than `max_body_bytes` is a 413, and is not read to its end.

    FastAPI's own `max_body_size` answers in plain text; this one leaves the answer to the error handlers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_body_bytes:
            await self.app(scope, self._refuse, send)
            return
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            return message if num_bytes <= self.max_body_bytes else await self._refuse()

        await self.app(scope, receive_within_limit, send)

    async def _refuse(self) -> Message:
        # FastAPI passes an HTTPException on that is raised while it reads the body.
        raise HTTPException(413, f"the body may have at most {self.max_body_bytes} bytes")
