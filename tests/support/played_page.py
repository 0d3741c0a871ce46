"""The page with a played cluster behind it: the real application on a real port; its stages make steps and previews."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from deployments.messages import (
    DenoisingBegun,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    PayloadFollows,
    ValueType,
)
from serve_app.making.stages import Stages
from tests.support.in_process import Server, description
from tests.support.played_stages import INPUTS, PREVIEW_INPUTS, PlayedHandle, Stream

TEXT, PICTURE = ValueType("str"), ValueType("picture")
PICTURES = ValueType("union", (PICTURE, ValueType("list", (PICTURE,))))
INPAINTING = description(
    "FluxInpaintPipeline",
    "image",
    "mask_image",
    "control_video",
    "voice",
    "sigmas",
    "mode",
    "use_detail",
    tasks=("text_to_image", "inpainting"),
    argument_types={
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "width": ValueType("int"),
        "height": ValueType("int"),
        "num_inference_steps": ValueType("int"),
        "guidance_scale": ValueType("float"),
        "true_cfg_scale": ValueType("float"),
        "image": PICTURES,
        "mask_image": PICTURE,
        "control_video": ValueType("video"),
        "voice": ValueType("sound"),
        "sigmas": ValueType("list", (ValueType("float"),)),
        "mode": ValueType("choice", choices=("fast", "fine")),
        "use_detail": ValueType("bool"),
    },
)
TEXT_TO_VIDEO = description("WanPipeline", "num_frames", media_kind="video", tasks=("text_to_video",))


@dataclass(eq=False)
class Broadcast:
    """The answers of all replicas, as Ray Serve gives them."""

    answers: list[Any]

    async def results_async(self, timeout_s: float | None = None) -> list[Any]:
        await asyncio.sleep(0)
        return self.answers


@dataclass
class Pace:
    """How fast the played stages are; a test changes it at any time."""

    step_s: float = 0.02
    steps: int = 8
    is_held: bool = False  # no step is made

    async def wait(self) -> None:
        """Until the next step is made."""
        await asyncio.sleep(self.step_s)
        while self.is_held:  # noqa: ASYNC110  (another thread says it)
            await asyncio.sleep(0.01)


class SteppingHandle(PlayedHandle):
    """A stage whose requests make steps, which those who watch the cluster can see."""

    def __init__(self, name: str, handle: PlayedHandle, pace: Pace, of: str = "") -> None:
        """`of`: of which of several models, for the deployment's name."""
        super().__init__(handle.describing, handle.make, handle.preview)
        self.deployment_name = f"{name}{of}"
        self.pace = pace
        self.requests = handle.requests
        self.stage = name.lower()
        self.present: dict[str, dict[str, Any]] = {}
        self.looks = 0
        self._num_made = 0

    def _denoise(self, request: GenerationRequest, envelope: Envelope, *_: Any) -> Stream:
        return Stream(self._steps(request, envelope))

    async def _steps(self, request: GenerationRequest, envelope: Envelope) -> AsyncIterator[Any]:
        num_steps = self.pace.steps
        shown = {num_steps * (number + 1) // (envelope.previews + 1) for number in range(envelope.previews)}
        seen = self.present[request.request_id] = {
            "request_id": request.request_id,
            "stage": "denoiser",
            "state": "running",
            "since_s": 0.1,
            "steps": 0,
            "num_steps": num_steps,
        }
        try:
            yield DenoisingBegun()
            for step in range(1, num_steps + 1):
                await self.pace.wait()
                seen["steps"] = step
                yield DenoisingProgress(step, num_steps, self.pace.step_s * (num_steps - step))
                if step in shown:
                    yield PayloadFollows("preview", step)
                    yield PREVIEW_INPUTS
            yield PayloadFollows("decode_inputs", num_steps)
            yield INPUTS
        finally:
            del self.present[request.request_id]
            self._num_made += 1

    def broadcast(self, method: str, *_: Any) -> Broadcast:
        if method == "adapters_held":
            return Broadcast([(), ()])
        assert method == "activity"
        self.looks += 1
        engine = {"batch_sizes": {1: self.looks, 4: 3 * self.looks}} if self.stage == "denoiser" else None
        return Broadcast([self._activity(number, engine) for number in range(2)])

    def _activity(self, number: int, engine: dict[str, Any] | None) -> dict[str, Any]:
        """Of one replica; all requests are in the first."""
        requests = [] if number else list(self.present.values())
        load = {
            "busy_s": self.looks * (0.1 if number else 0.7),
            "present": len(requests),
            "arrived": self._num_made,
            "request_s": 0.5,
        }
        return {
            "replica_id": f"{self.deployment_name}#{number}",
            "stages": (self.stage,),
            "loads": {self.stage: load},
            "requests": requests,
            "engine": engine,
        }


class PageServer(Server):
    """The application as a browser reaches it, under `prefix` as Serve's proxy does."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.prefix = prefix
        self.pace = Pace()
        self.refusals: list[tuple[int, int]] = []  # (status, Retry-After) for the next POSTs of media
        super().__init__(folder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix and not scope["path"].startswith(self.prefix):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        is_media = scope["method"] == "POST" and scope["path"].removeprefix(self.prefix).startswith(
            ("/v1/images", "/v1/videos", "/v1/audio")
        )
        if is_media and self.refusals:
            status, retry_after_s = self.refusals.pop(0)
            headers = [(b"retry-after", str(retry_after_s).encode()), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            text = b'{"error": {"message": "too many requests are waiting", "code": null, "param": null}}'
            await send({"type": "http.response.body", "body": text})
            return
        await super().__call__({**scope, "root_path": self.prefix}, receive, send)

    def stages(self) -> Stages:
        """Three deployments, each with two replicas."""
        self.encoder, self.denoiser, self.vae = self._stepping(self.handle)
        return Stages(self.encoder, self.denoiser, self.vae)

    def all_stages(self) -> dict[str, Stages]:
        several = {name: Stages(*self._stepping(handle, f"-{name}")) for name, handle in self.handles.items()}
        return several or super().all_stages()

    def _stepping(self, handle: PlayedHandle, of: str = "") -> tuple[Any, Any, Any]:
        encoder, denoiser, vae = (
            SteppingHandle(name, handle, self.pace, of) for name in ("Encoder", "Denoiser", "VAE")
        )
        return encoder, denoiser, vae


@dataclass(frozen=True)
class ServedPage:
    """A server that runs, and the address of its page."""

    server: PageServer
    url: str


@contextmanager
def served_page(folder: Path, prefix: str = "", **args: Any) -> Iterator[ServedPage]:
    """On a free port of this machine, in a thread; `args`: those of Server.configure."""
    server = PageServer(folder, prefix)
    server.configure(**args)
    config = uvicorn.Config(server, host="127.0.0.1", port=0, lifespan="off", log_level="error", ws="none")
    web = uvicorn.Server(config)

    async def run() -> None:
        await server.open()
        server.service.start()
        try:
            await web.serve()
        finally:
            server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    give_up = time.monotonic() + 60
    while not web.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < give_up, "the server did not start in time"
        time.sleep(0.02)
    port = web.servers[0].sockets[0].getsockname()[1]
    try:
        yield ServedPage(server, f"http://127.0.0.1:{port}{prefix}/")
    finally:
        web.should_exit = web.force_exit = True
        thread.join(timeout=30)
