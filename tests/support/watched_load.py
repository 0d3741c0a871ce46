"""An application under a load that moves every metric that a machine without GPU and S3 can move."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.api_keys import new_key
from serve_app.tools.launch import processes_of_session
from tests.support.prometheus import played_exporter, wait_until
from tests.support.served_application import ROOT, free_port, has_title, sessions_of

EMOJI = ROOT / "ray_configs/serve_emoji_cpu.yaml"
SECRET = "whsec_c2VjcmV0IG9mIGEgdGVzdA=="
START_TIMEOUT_S = 1500
BODY = {"size": "64x64", "num_inference_steps": 12}


@dataclass
class WatchedApplication:
    """Of serve_emoji_cpu.yaml with keys, webhooks and checkpoints, as `make serve` runs it."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    webhook_url: str
    statuses: list[int] = field(default_factory=list)

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        """POST /v1/images/generations."""
        headers = {"authorization": f"Bearer {self.key}", **headers}
        answer = httpx.post(f"{self.url}/v1/images/generations", json=BODY | body, headers=headers, timeout=600)
        self.statuses.append(answer.status_code)
        return answer

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {self.key}"}, timeout=60)

    def kill_a_denoiser(self) -> None:
        """As the kernel does it."""
        title = "ray::ServeReplica:triptych:Denoiser"
        [session] = sessions_of(self.process)
        killed = [each for each in processes_of_session(session) if has_title(each, title)]
        assert killed, "no denoiser runs"
        for process in killed:
            process.kill()


@contextmanager
def watched_application(folder: Path) -> Iterator[WatchedApplication]:
    """Serves until the end of the context."""
    config, port = yaml.safe_load(EMOJI.read_text()), free_port()
    key, line = new_key("somebody")
    (folder / "keys").write_text(f"{line}\n")
    (folder / "secret").write_text(SECRET)
    config["http_options"]["port"] = port
    [application] = config["applications"]
    application["runtime_env"]["env_vars"]["SGLANG_DIFFUSION_CACHE_ROOT"] = str(folder / "cache")
    application["args"] |= {
        "api_keys_file": str(folder / "keys"),
        "private_targets": True,
        "output_directory": str(folder / "outputs"),
        "jobs": {"webhook_secret": {"file": str(folder / "secret")}, "lease_s": 5},
        "denoising": {"checkpoint_every": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    log = (folder / "serve.log").open("wb")
    command = [sys.executable, "-m", "serve_app.tools.launch", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))
    try:
        with played_exporter(lambda: "") as receiver:
            webhook_url = f"http://127.0.0.1:{receiver}/told"
            watched = WatchedApplication(f"http://127.0.0.1:{port}", key, process, webhook_url)
            wait_until(lambda: _is_healthy(watched), f"not healthy: {folder / 'serve.log'}", START_TIMEOUT_S)
            yield watched
    finally:
        process.terminate()
        process.wait(120)
        log.close()


def _is_healthy(application: WatchedApplication) -> bool:
    assert application.process.poll() is None, "the launcher has ended"
    try:
        return httpx.get(f"{application.url}/health", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def load(application: WatchedApplication, seconds: float, callers: int = 3) -> None:
    """Pictures, LoRAs, Cache-DiT, jobs with webhooks, equal requests, callers' faults; a denoiser dies on the way."""
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=_call, args=(application, number, end)) for number in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    application.kill_a_denoiser()
    for thread in threads:
        thread.join()


def _call(application: WatchedApplication, caller: int, end: float) -> None:
    number = 0
    while time.monotonic() < end:
        number += 1
        prompt = f"a fox {caller} {number}"
        application.post({"prompt": "the same fox", "seed": number})  # all callers at about the same time
        application.post({"prompt": prompt, "loras": [{"name": ("neon", "sketch")[number % 2]}]})
        application.post({"prompt": prompt, "cache_dit": {"enable": True}})
        application.post({"prompt": prompt, "num_inference_steps": -1})
        job = {"prompt": prompt, "webhook_url": application.webhook_url}
        taken = application.post(job, prefer="respond-async")
        application.get("/v1/nothing")
        if taken.status_code == 202:
            location = taken.headers["location"]
            wait_until(partial(_has_ended, application, location), "the job has not ended", 600)


def _has_ended(application: WatchedApplication, location: str) -> bool:
    status = application.get(location).json().get("status")
    return status in ("completed", "failed", "cancelled")
