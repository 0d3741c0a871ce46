"""The launcher as a process, with a toy application to launch."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
REAL = ("-m", "serve_app.tools.launch")
PLAYED = ("-m", "tests.support.played_serve", "launch")  # the same with a played `serve` and no Ray


def config_file(folder: Path, port: int, **args: Any) -> Path:
    application = {
        "name": "toy",
        "route_prefix": "/",
        "import_path": "tests.support.toy_app:build_app",
        "args": args,
        "deployments": [
            {"name": name, "ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 5}
            for name in ("Ingress", "Encoder")
        ],
    }
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    file = folder / "serve_toy.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@contextmanager
def launched(config: Path, folder: Path, module: tuple[str, ...] = PLAYED) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "output").open("wb") as out:
        launcher = subprocess.Popen(
            [sys.executable, *module, str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait(90)


def output(folder: Path) -> str:
    return (folder / "output").read_text()


def wait_for_output(launcher: subprocess.Popen[bytes], folder: Path, text: str) -> None:
    deadline = time.monotonic() + 180
    while text not in output(folder):
        assert launcher.poll() is None, output(folder)
        assert time.monotonic() < deadline, output(folder)
        time.sleep(0.2)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
