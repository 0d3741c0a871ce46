"""diffusers' own example of a server, for any text-to-image pipeline on a CPU.

    python -m benchmarks.rivals.diffusers_server MODEL PORT FOLDER DEVICE

The structure is that of examples/server/server.py in diffusers' repository ("Create a server" in its documentation),
in its newest version (which chooses the device itself): FastAPI and uvicorn; one pipeline whose components each
request shares through `from_pipe`, with a scheduler of its own; the call in a thread of asyncio's default executor
(four threads more than cores); the picture saved to FOLDER, which is served, and answered as its URL. Written
afresh; what is different: a CPU, the pipeline of a checkpoint folder, and a request with seed, side, steps and the
length of the text. examples/server-async has the same structure with a shallow copy instead of `from_pipe`.
"""

import asyncio
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import BaseModel

from benchmarks.rivals import in_process


class TextToImageInput(BaseModel):
    prompt: str
    seed: int
    side: int
    steps: int
    text_tokens: int


Generate = Callable[..., Image.Image]


def main() -> None:
    model, port, folder, device = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    shared = in_process.load(model, device)

    def own_pipeline() -> Generate:
        """The shared components with a new scheduler."""
        scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
        pipeline = type(shared).from_pipe(shared, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)  # as in the other ways
        return lambda **arguments: in_process.generate(pipeline, **arguments)

    folder.mkdir(parents=True, exist_ok=True)
    app = create_app(own_pipeline, folder, f"http://127.0.0.1:{port}")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def create_app(own_pipeline: Callable[[], Generate], folder: Path, url: str) -> FastAPI:
    """`own_pipeline` gives what makes the picture of one request from the fields of `TextToImageInput`."""
    app = FastAPI()
    app.mount("/images", StaticFiles(directory=folder), name="images")
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )

    @app.get("/")
    async def welcome() -> str:
        return "a server of diffusers"

    @app.post("/v1/images/generations")
    async def generate_image(body: TextToImageInput) -> dict[str, Any]:
        generate = own_pipeline()
        loop = asyncio.get_running_loop()
        picture = await loop.run_in_executor(None, lambda: generate(**body.model_dump()))
        name = f"draw{uuid.uuid4()}.png"
        picture.save(folder / name)
        return {"data": [{"url": f"{url}/images/{name}"}]}

    return app


if __name__ == "__main__":
    main()
