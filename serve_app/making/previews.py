"""Decodes what the denoiser shows on its way; it never delays the picture itself, nor fails it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.messages import Envelope, GenerationRequest, OutputFormat
from serve_app.making.follower import Follower
from serve_app.making.ray_errors import first_line

logger = logging.getLogger(__name__)


class Previews:
    """Those of one way through the stages; `shown` holds the steps that were shown on earlier ways."""

    def __init__(self, vae: DeploymentHandle, request: GenerationRequest, follower: Follower, shown: set[int]) -> None:
        self._vae = vae
        self._request = request
        self._follower = follower
        self._shown = shown
        self._tasks: set[asyncio.Task[None]] = set()

    def show(self, step: int, inputs: Any) -> None:
        """Decode `inputs` (a reference) beside the denoising and tell the follower."""
        if step not in self._shown:
            self._shown.add(step)
            task = asyncio.ensure_future(self._show(step, inputs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _show(self, step: int, inputs: Any) -> None:
        request = self._request
        try:
            if request.output.kind == "video":  # its first frame
                request = dataclasses.replace(request, output=OutputFormat("image", "jpeg"))
            envelope = Envelope(trace=tracing.carried())
            self._follower.on_preview(step, await self._vae.decode.remote(request, inputs, envelope))
        except Exception as error:  # noqa: BLE001  (the picture itself comes, or says what is wrong)
            logger.warning("request %s: no preview of step %d: %s", request.request_id, step, first_line(error))

    def stop(self) -> None:
        """What is not decoded yet comes too late."""
        for task in self._tasks:
            task.cancel()
