"""Schemathesis against the real routes: whatever it sends, answers are as /openapi.json says, and never a 5xx."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import uvicorn

from deployments.messages import GenerationRequest, Media, MediaFile, StageDescription
from tests.support.in_process import Server, description, serving
from tests.support.served_application import free_port

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)
MIN_CASES = 1000  # of each kind
MODELS = {
    "image": description("FluxPipeline", "image", "mask_image", "strength", "max_sequence_length"),
    "video": description("WanPipeline", "image", "num_frames", "fps", media_kind="video"),
}


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """The application behind a real HTTP server in a thread, with its jobs running; its URL."""
    port = free_port()
    config = uvicorn.Config(server, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    http_server = uvicorn.Server(config)

    async def run() -> None:
        await server.open()
        server.service.start()
        await http_server.serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        while not http_server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}"
    finally:
        http_server.should_exit = True
        thread.join()


async def make_video(request: GenerationRequest) -> Media:
    return Media((MediaFile(tiny_video(), "video/mp4", 32, 32, 2, 8.0),), {"denoiser_forwards": 0.01, "decode": 0.01})


def tiny_video() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MODELS)
def test_no_request_finds_an_answer_that_is_not_documented(kind: str, tmp_path: Path) -> None:
    model: StageDescription = MODELS[kind]
    with serving(tmp_path) as server:
        server.configure(model)
        if kind == "video":
            server.make = make_video
        with listening(server) as url:
            command = [
                *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json"),
                *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "20"),
                *("--seed", "1", "--continue-on-failure", "--request-timeout", "20", "--no-color"),
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"COLUMNS": "120"}
            )
    assert done.returncode == 0, done.stdout[-15_000:] + done.stderr[-2_000:]
    [generated] = re.findall(r"(\d[\d,]*) generated", done.stdout)
    assert int(generated.replace(",", "")) >= MIN_CASES


async def test_the_document_tells_of_our_errors_and_not_of_fastapis(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        async with server.client() as client:
            document = (await client.get("/openapi.json")).json()
            refused = await client.post("/v1/images/generations", json={"prompt": 1})
    assert "ValidationError" not in document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert operations
    for operation in operations:
        assert "422" not in operation["responses"]
        assert {"4XX", "5XX"} <= set(operation["responses"])
    fields = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    assert set(refused.json()["error"]) == set(fields)


async def test_edits_are_documented_as_json_and_as_a_form(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        async with server.client() as client:
            document = (await client.get("/openapi.json")).json()
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert "prompt" in content["application/json"]["schema"]["properties"]
