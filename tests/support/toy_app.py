"""A small Serve application, without torch, that answers GET /health as Triptych does."""

import asyncio
import time

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

api = FastAPI()


class Limits(BaseModel):
    model_config = ConfigDict(extra="forbid")

    largest_side: int = 512


class ToyArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    load_s: float = 0.0
    refused: str | None = None
    limits: Limits = Limits()


@serve.deployment
class Encoder:
    def __init__(self, args: ToyArgs) -> None:
        if args.refused:
            raise ValueError(f"SGLANG_DIFFUSION_ATTENTION_BACKEND={args.refused!r} is not allowed")
        time.sleep(args.load_s)

    async def ready(self) -> bool:
        return True


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, encoder: DeploymentHandle) -> None:
        self.encoder = encoder

    @api.get("/health")
    async def health(self) -> JSONResponse:
        try:
            await asyncio.wait_for(self.encoder.ready.remote(), 0.3)
        except TimeoutError:
            stage = {"ready": False, "detail": "loading weights"}
            return JSONResponse({"status": "loading", "stages": {"Encoder": stage}, "missing": ["Encoder"]}, 503)
        stage = {"ready": True, "detail": ""}
        return JSONResponse({"status": "ok", "stages": {"Encoder": stage}, "missing": []})


def build_app(args: ToyArgs) -> Application:
    return Ingress.bind(Encoder.bind(args))


def build_app_untyped(args: "ToyArgs") -> Application:
    return build_app(args)
