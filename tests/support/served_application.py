"""Real applications, started by the real launcher on one Ray, for all tests of served behaviour."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
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

from serve_app.tools.launch import LOG_FILE, processes_of_session
from tests.support.forking.command import FORKED_PYTHON, forks_in

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
START_TIMEOUT_S = 400  # two cores that others use too; each replica imports torch and diffusers
STOP_TIMEOUT_S = 120
THREE_STAGE, TWO_STAGE, ONE_STAGE = ("Encoder", "Denoiser", "VAE"), ("EncoderVAE", "Denoiser"), ("Pipeline",)
CHECKPOINT_EVERY = 1
OUTPUT = "launcher.log"  # what the launcher prints; what `serve run` does is in its own log
LORAS = "loras"  # the folder beside the log from which the first application may be told to load some
FORKS = {"py_executable": shlex.join(FORKED_PYTHON)}  # in a `runtime_env`: processes start as forks
PLAIN = {"py_executable": sys.executable}  # there they start as users' do
DEFAULT_ARGUMENTS = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 32}


@dataclass(frozen=True)
class ServedApplication:
    """The launcher and what it serves; `config` is that of its file, with the application `triptych` at /."""

    url: str
    config: dict[str, Any]
    folder: Path
    launcher: subprocess.Popen[bytes]
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
            assert self.launcher.poll() is None, f"the launcher ended:\n{self.launchers_output()}"
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
        alike = [each for each in self.processes() if has_title(each, title)]
        [process] = [each for each in alike if each.ppid() not in {other.pid for other in alike}]  # what it forks
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
        [session] = sessions_of(self.launcher)
        return processes_of_session(session)

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
        file = self.folder / LOG_FILE
        return re.sub(r"\x1b\[[0-9;]*m", "", file.read_text(errors="replace")) if file.exists() else ""

    def launchers_output(self) -> str:
        return (self.folder / OUTPUT).read_text(errors="replace")


@contextmanager
def launched_application(checkpoint: Path, folder: Path) -> Iterator[ServedApplication]:
    """Serve the checkpoint until the end of the context, which fails if a process is left behind."""
    (folder / LORAS).mkdir()
    only = application(
        "triptych",
        checkpoint,
        THREE_STAGE,
        folder,
        denoising={"checkpoint_every": CHECKPOINT_EVERY},
        jobs={"lease_s": 5},
        adapter_places=[str(folder / LORAS)],
    )
    with serve_application(only, folder) as served:
        yield served


@contextmanager
def serve_application(entry: dict[str, Any], folder: Path) -> Iterator[ServedApplication]:
    """The same for an entry of `applications`."""
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [entry],
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with ExitStack() as cleaning:
        ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets in it have 107 characters
        cleaning.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        output = cleaning.enter_context((folder / OUTPUT).open("wb"))
        launcher = subprocess.Popen(
            [sys.executable, "-m", "serve_app.tools.launch", str(folder / "serve.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(folder) | forks_in(ray_folder) | {"RAY_TMPDIR": ray_folder},
        )
        cleaning.callback(stop, launcher)
        served = ServedApplication(f"http://127.0.0.1:{port}", config, folder, launcher)
        served.wait_until_healthy()
        while "Ready: " not in served.launchers_output():  # it asks too, twice a second
            served.wait_until_healthy()
            time.sleep(0.1)
        yield served


def application(
    name: str,
    checkpoint: Path,
    deployments: tuple[str, ...],
    folder: Path,
    env_vars: dict[str, str] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """An entry of `applications`; the one named `triptych` is at /, others at /<name>.

    Its processes start as forks, but for the ingress of the first, whose process is to show that it has no torch.
    """
    return {
        "name": name,
        "route_prefix": "/" if name == "triptych" else f"/{name}",
        "import_path": "serve_app.app:build_app",
        "runtime_env": FORKS | {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu", **(env_vars or {})}},
        "args": {
            "model": str(checkpoint),
            "default_arguments": DEFAULT_ARGUMENTS,
            "limits": {"max_steps": 1000, "max_body_bytes": 25_000_000},
            "output_directory": str(folder / name),
            **args,
        },
        "deployments": [
            {"name": "Ingress", "graceful_shutdown_timeout_s": 5}  # by default it drains for minutes
            | ({"ray_actor_options": {"num_cpus": 0, "runtime_env": PLAIN}} if name == "triptych" else {}),
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
        "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill replicas of its own choice
        "RAY_raylet_start_wait_time_s": "300",  # two cores that others use too
        "RAY_worker_register_timeout_seconds": "300",  # the first waits until the server of forks has imported all
        "RAY_worker_niceness": "0",  # the workers must not starve beside the tests
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
    }


def has_title(process: psutil.Process, title: str) -> bool:
    """Ray writes the method that runs after an actor's title."""
    told = "".join(process.cmdline()[:1])
    return told == title or told.startswith(f"{title}.")


def sessions_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """That of `serve run`, once it has been started."""
    children = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    return [each.pid for each in children if os.getsid(each.pid) == each.pid]


def stop(launcher: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, if it runs.

    Raises AssertionError if it does not end well, or leaves a process behind, which is ended then.
    """
    if launcher.poll() is not None:
        return
    sessions = sessions_of(launcher)
    launcher.send_signal(signal.SIGINT)
    try:
        code = launcher.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        code = launcher.wait()
    left = [each for session in sessions for each in processes_of_session(session)]
    names = [each.name() for each in left]
    for each in left:
        each.kill()
    assert (code, names) == (0, []), "the launcher's exit code, and what it left behind"


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
