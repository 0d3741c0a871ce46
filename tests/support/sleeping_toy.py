"""The real ingress and Serve's real autoscaling, with stages that load no torch: what sleeps starts within seconds."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from deployments.messages import (
    ArgumentDescription,
    Conditioning,
    DecodeInputs,
    Effects,
    Envelope,
    GenerationRequest,
    Media,
    MediaFile,
    Packed,
    PayloadFollows,
    StageDescription,
)
from serve_app.app import ingress_before
from serve_app.service import ServiceArgs
from tests.support.in_process import TEXT_TO_IMAGE, picture


class ToyArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    output_directory: str
    load_s: float = 1.0
    request_s: float = 0.2


class Stage:
    """Every stage; one request at a time counts as work."""

    def __init__(self, stage: str, args: ToyArgs) -> None:
        time.sleep(args.load_s)
        self.stage, self.args = stage, args
        self.arrived = self.present = 0

    async def describe(self) -> StageDescription:
        return TEXT_TO_IMAGE

    async def effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        return Effects()

    async def arguments(self, names: tuple[str, ...], defaults: dict[str, Any]) -> list[ArgumentDescription]:
        return [ArgumentDescription(name, "any", None, "always") for name in names]

    async def _work(self) -> None:
        self.arrived += 1
        self.present += 1
        try:
            await asyncio.sleep(self.args.request_s)
        finally:
            self.present -= 1

    async def encode(self, request: GenerationRequest, envelope: Envelope) -> Conditioning:
        await self._work()
        return Conditioning(Packed(None))

    async def denoise(self, request: GenerationRequest, envelope: Envelope, *_: Any) -> AsyncIterator[Any]:
        await self._work()
        yield PayloadFollows("decode_inputs", 1)
        yield DecodeInputs("result", Packed("the picture"))

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs, *_: Any) -> Media:
        await self._work()
        colour = hashlib.sha256(str(request.seed).encode()).digest()
        data = picture(colour=(colour[0], colour[1], colour[2]))
        return Media((MediaFile(data, "image/png", 32, 32),), {"denoise": self.args.request_s})

    async def record_autoscaling_stats(self) -> dict[str, float]:
        told = {"arrived": self.arrived, "present": self.present, "refused": 0, "busy_s": 0, "outstanding_s": 0}
        return {f"{self.stage}_{name}": float(value) for name, value in told.items()}


def build_app(args: ToyArgs) -> Application:
    names = {"Encoder-toy": "encoder", "Denoiser-toy": "denoiser", "VAE-toy": "vae"}
    encoder, denoiser, vae = (serve.deployment(name=name)(Stage).bind(stage, args) for name, stage in names.items())
    service = ServiceArgs(models={"toy": {"sleep": {"max_wait_s": 600}}}, output_directory=Path(args.output_directory))
    return ingress_before({"toy": (encoder, denoiser, vae)}, service, {"toy": "1"})
