"""Schemathesis against the real routes: whatever it sends, answers are as /openapi.json says, and never a 5xx."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tests.support.in_process import Server, description, serving
from tests.support.served_application import free_port
from tests.support.videos import make_video

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)
# 504 is no fault of the server's: the caller's own limit of time was over.
CONFIG = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
MODELS = {
    "image": description("FluxPipeline", "image", "mask_image", "strength", "max_sequence_length"),
    "video": description("WanPipeline", "image", "num_frames", "fps", media_kind="video"),
}


def check_answers(kind: str, folder: Path, *operations: str, max_examples: int) -> int:
    """So many random requests to each operation, the same in every run, beside those that go through all its fields.

    `operations` are options of Schemathesis that choose some of them. Returns how many requests that were in all.
    """
    with serving(folder) as server:
        server.configure(MODELS[kind])
        if kind == "video":
            server.make = make_video
        (folder / "schemathesis.toml").write_text(CONFIG)
        with listening(server) as url:
            command = [
                *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json"),
                *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", str(max_examples)),
                *operations,
                *("--seed", "1", "--continue-on-failure", "--request-timeout", "20", "--no-color"),
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | {"COLUMNS": "120"}
            )
    assert done.returncode == 0, done.stdout[-15_000:] + done.stderr[-2_000:]
    [generated] = re.findall(r"(\d[\d,]*) generated", done.stdout)
    return int(generated.replace(",", ""))


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
