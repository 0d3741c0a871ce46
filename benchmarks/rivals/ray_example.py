"""Ray's documented way to serve Stable Diffusion on Serve, for any pipeline on a CPU.

The structure is that of "Serve a Stable Diffusion Model" in Ray's documentation (doc/source/serve/doc_code/
stable_diffusion.py): a FastAPI ingress calls one deployment that holds the whole pipeline, whose plain `generate`
makes the picture and returns it to the ingress, which writes the PNG file. Written afresh; what is different:

* a CPU instead of a GPU with autocast; the pipeline of a checkpoint folder instead of Stable Diffusion XL;
* the request has a seed, steps, and the length of the text, because the requests are the same for all ways;
* the number of replicas is fixed (the example starts the first when the first request comes, at most two);
* `/health`, which serve_app.tools.launch waits for.

Serve runs a plain method in threads, by default as many as a replica may have requests (5). The example's pipeline
is then called by several threads at once, which diffusers does not allow. `max_ongoing_requests: 1` mends that.
"""

# No `from __future__ import annotations`: the FastAPI app is pickled, and Serve reads the builder's annotation.

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from benchmarks.rivals import in_process

app = FastAPI()


class RayExampleArgs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a checkpoint folder")
    device: str = "cpu"
    max_ongoing_requests: int = Field(5, description="of a replica of the model; 5 is Serve's default")
    num_replicas: int = Field(1, description="of the model")


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(app)
class APIIngress:
    def __init__(self, diffusion_model: DeploymentHandle) -> None:
        self.diffusion_model = diffusion_model

    @app.get("/imagine", response_class=Response)
    async def imagine(self, prompt: str, seed: int, side: int, steps: int, text_tokens: int) -> Response:
        picture: Any = await self.diffusion_model.generate.remote(prompt, seed, side, steps, text_tokens)
        return Response(content=in_process.png_of(picture), media_type="image/png")

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {}


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class DiffusionModel:
    def __init__(self, model: str, device: str) -> None:
        self.pipeline = in_process.load(model, device)

    def generate(self, prompt: str, seed: int, side: int, steps: int, text_tokens: int) -> Any:
        return in_process.generate(self.pipeline, prompt, seed, side, steps, text_tokens)


def build_app(args: RayExampleArgs) -> Application:
    model = DiffusionModel.options(  # type: ignore[attr-defined]
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 0 if args.device == "cpu" else 0.1},
    )
    application: Application = APIIngress.bind(model.bind(args.model, args.device))  # type: ignore[attr-defined]
    return application
