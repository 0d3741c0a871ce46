"""Real applications, run by the real `serve run` on one Ray, for all tests of served behaviour."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from PIL import Image

from env_config.ray_proxy import AROUND_PROXY, VARIABLE
from serve_app.tools.launch import processes_of_session

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
START_TIMEOUT_S = 280  # two cores that others use too; each replica imports torch and diffusers
STOP_TIMEOUT_S = 120
THREE_STAGE, TWO_STAGE, ONE_STAGE = ("Encoder", "Denoiser", "VAE"), ("EncoderVAE", "Denoiser"), ("Pipeline",)
CHECKPOINT_EVERY = 1
LORAS = "loras"  # the folder beside the log from which the first application may be told to load some
DEFAULT_ARGUMENTS = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 32}


@dataclass(frozen=True)
class ServedApplication:
    """`serve run` and what it serves; `config` is that of its file, with the application `triptych` at /."""

    url: str
    config: dict[str, Any]
    folder: Path
    serve_run: subprocess.Popen[bytes]
    others: list[dict[str, Any]] = field(default_factory=list)  # applications beside the first

    def generate(self, prefix: str = "", **body: Any) -> httpx.Response:
        """POST /v1/images/generations."""
        return httpx.post(f"{self.url}{prefix}/v1/images/generations", json=body, timeout=START_TIMEOUT_S)

    def pictures(self, prefix: str = "", **body: Any) -> list[dict[str, Any]]:
        """The `data` of an answer to a good request."""
        answer = self.generate(prefix, **body)
        assert answer.status_code == 200, f"{answer.text}\n{self.log()[-5000:]}"
        data: list[dict[str, Any]] = answer.json()["data"]
        return data

    def health(self, prefix: str = "") -> httpx.Response:
        return httpx.get(f"{self.url}{prefix}/health", timeout=30)

    def wait_until_healthy(self, prefix: str = "") -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy(prefix):
            assert self.serve_run.poll() is None, f"`serve run` ended:\n{self.log()[-5000:]}"
            assert time.monotonic() < give_up, f"{prefix or '/'} is not healthy:\n{self.log()[-5000:]}"
            time.sleep(0.3)

    def _is_healthy(self, prefix: str) -> bool:
        try:
            return self.health(prefix).status_code == 200
        except httpx.TransportError:
            return False

    def process_of(self, deployment: str, application: str = "triptych") -> psutil.Process:
        """The process of the deployment's one replica."""
        title = f"ray::ServeReplica:{application}:{deployment}"
        [process] = [each for each in self.processes() if title in each.cmdline()[:1]]
        return process

    def ray_address(self) -> str:
        """Where Ray listens for a driver."""
        [raylet] = [each for each in self.processes() if each.name() == "raylet"]
        [address] = set(re.findall(r"--gcs-address=(\S+)", " ".join(raylet.cmdline())))
        return str(address)

    def dashboard(self) -> str:
        """Where Serve's REST API listens."""
        [url] = re.findall(r"View the dashboard at (http\S+)", self.log())
        return str(url)

    def processes(self) -> list[psutil.Process]:
        """All that `serve run` started, itself included."""
        return processes_of_session(self.serve_run.pid)

    def cli(self, command: str, *arguments: str) -> str:
        """What `serve <command>` prints."""
        done = subprocess.run(
            [*SERVE, command, "--address", self.dashboard(), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(self.folder),
            check=True,
        )
        return done.stdout

    @contextmanager
    def beside(self, *applications: dict[str, Any]) -> Iterator[None]:
        """Deploy these applications beside those that are there, which stay; remove them afterwards."""
        self.others.extend(applications)
        self.deploy()
        try:
            yield
        finally:
            self.others[:] = [each for each in self.others if each not in applications]
            self.deploy()

    def deploy(self) -> None:
        """As `serve deploy` does, without the seconds that its process takes to start."""
        config = {**self.config, "applications": [*self.config["applications"], *self.others]}
        httpx.put(f"{self.dashboard()}/api/serve/applications/", json=config, timeout=60).raise_for_status()

    def status(self) -> dict[str, Any]:
        """What Serve's REST API says of the applications, by name: more than `serve status` prints, and sooner."""
        answer = httpx.get(f"{self.dashboard()}/api/serve/applications/", timeout=60).raise_for_status()
        applications: dict[str, Any] = answer.json()["applications"]
        return applications

    def log(self) -> str:
        """What `serve run` and the replicas printed, without terminal colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.folder / "serve.log").read_text(errors="replace"))


@contextmanager
def serve_run(checkpoint: Path, folder: Path) -> Iterator[ServedApplication]:
    """Serve the checkpoint until the end of the context, which fails if a process is left behind."""
    (folder / LORAS).mkdir()
    first = application(
        "triptych",
        checkpoint,
        THREE_STAGE,
        folder,
        denoising={"checkpoint_every": CHECKPOINT_EVERY},
        jobs={"lease_s": 5},
        adapter_places=[str(folder / LORAS)],
    )
    with serve_application(first, folder) as served:
        yield served


@contextmanager
def serve_application(first: dict[str, Any], folder: Path) -> Iterator[ServedApplication]:
    """Serve this application until the end of the context, which fails if a process is left behind."""
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [first],
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with ExitStack() as cleaning:
        ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets in it have 107 characters
        cleaning.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        log = cleaning.enter_context((folder / "serve.log").open("wb"))
        process = subprocess.Popen(
            [*SERVE, "run", "--address", "local", str(folder / "serve.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=environment(folder) | {"RAY_TMPDIR": ray_folder},
        )
        cleaning.callback(stop, process)
        served = ServedApplication(f"http://127.0.0.1:{port}", config, folder, process)
        served.wait_until_healthy()
        yield served


def application(
    name: str,
    checkpoint: Path,
    deployments: tuple[str, ...],
    folder: Path,
    env_vars: dict[str, str] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """An entry of `applications`; the one named `triptych` is at /, others at /<name>."""
    return {
        "name": name,
        "route_prefix": "/" if name == "triptych" else f"/{name}",
        "import_path": "serve_app.app:build_app",
        "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu", **(env_vars or {})}},
        "args": {
            "model": str(checkpoint),
            "default_arguments": DEFAULT_ARGUMENTS,
            "limits": {"max_steps": 1000, "max_body_bytes": 25_000_000},
            "output_directory": str(folder / name),
            **args,
        },
        "deployments": [
            {"name": "Ingress", "graceful_shutdown_timeout_s": 5},  # by default it drains for minutes
            *(
                {"name": deployment, "ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}
                for deployment in deployments
            ),
        ],
    }


def environment(folder: Path) -> dict[str, str]:
    """Ray's own settings for tests; that of arithmetic is inherited from tests.conftest."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        VARIABLE: AROUND_PROXY,  # as the launcher does
        "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill replicas of its own choice
        "RAY_worker_niceness": "0",  # the workers must not starve beside the tests
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; raises AssertionError if that leaves a process behind, after it has been ended."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
        psutil.wait_procs(processes_of_session(process.pid), timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    left = processes_of_session(process.pid)
    names = [each.name() for each in left]
    for each in left:
        each.kill()
    process.wait()
    assert not names, f"`serve run` left {names} behind"


def picture_of(item: dict[str, Any]) -> Image.Image:
    """The picture in an entry of `data` that has its bytes."""
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.content)["error"]
    return error


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
