"""A config file served as a user serves it (`serve_app.tools.launch`), in a folder of its own, for benchmarks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scale_validation import ROOT, wait_until_healthy

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}  # the second: equal inputs give equal bits
STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Served:
    """A running application with stage logging."""

    url: str
    logs: Path  # the folder of performance.jsonl and requests.jsonl
    config: dict[str, Any]  # of its file

    @property
    def model(self) -> Path:
        return ROOT / str(self.config["applications"][0]["args"]["model"])

    @property
    def device(self) -> str:
        return str(self.config["applications"][0]["runtime_env"]["env_vars"]["SGLANG_DIFFUSION_TARGET_DEVICE"])

    @property
    def default_arguments(self) -> dict[str, Any]:
        return dict(self.config["applications"][0]["args"].get("default_arguments", {}))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of one of the logs."""
        file = self.logs / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def served(
    config_file: Path, folder: Path, port: int = 0, model: Path | None = None, **env_vars: str
) -> Iterator[Served]:
    """`model` in place of the file's; port 0 is a free one. Raises RuntimeError when it does not become ready."""
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port = port or free_port()
    application = config["applications"][0]
    application["args"]["output_directory"] = str(folder / "outputs")
    if model is not None:
        application["args"]["model"] = str(model.resolve())
    application["runtime_env"]["env_vars"] |= {
        "SGLANG_DIFFUSION_STAGE_LOGGING": "1",
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
        **env_vars,
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = os.environ | ONE_THREAD
    environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", "serve_app.tools.launch", str(file)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, folder / "outputs" / "serve.log")
        yield Served(url, folder / "cache" / "logs", config)
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
