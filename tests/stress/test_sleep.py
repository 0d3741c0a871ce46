"""Two models go to sleep for real and are woken by requests: their processes are gone, and their bytes are the same.

Both embedded models, pictures in three stages and videos in one: `pytest tests/stress/test_sleep.py -s` prints figures.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from tests.support.asleep import PATIENCE_S, states, until
from tests.support.served_application import ROOT, ServedApplication, application, serve_application

pytestmark = pytest.mark.timeout(1800)

FLUX, WAN = ("Encoder-emoji-flux", "Denoiser-emoji-flux", "VAE-emoji-flux"), ("Pipeline-emoji-wan",)
IDLE_S = 20
LONGEST_WAIT_S = 3
BODY: dict[str, Any] = {"prompt": "a cat", "model": "emoji-flux", "deterministic": True, "num_inference_steps": 4}
VIDEO: dict[str, Any] = {"prompt": "a cat", "model": "emoji-wan", "deterministic": True, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def sleepers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    folder = tmp_path_factory.mktemp("sleepers")
    entry = application("triptych", ROOT, (*FLUX, *WAN), folder)
    models = ROOT / "checkpoints"
    entry["args"] = {
        "models": {
            "emoji-flux": {"model": str(models / "emoji-flux"), "default_arguments": {"height": 64, "width": 64}},
            "emoji-wan": {
                "model": str(models / "emoji-wan"),
                "placement": "one_stage",
                "default_arguments": {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 1.0},
                "sleep": {"max_wait_s": LONGEST_WAIT_S},
            },
        },
        "output_directory": str(folder / "outputs"),
    }
    entry["args"]["models"]["emoji-flux"]["sleep"] = {"max_wait_s": PATIENCE_S}
    entry["autoscaling_policy"] = {
        "policy_function": "serve_app.autoscaling:ReplicaRatio",
        "policy_kwargs": {"idle_s": IDLE_S, "target_queue_s": PATIENCE_S},
    }
    for deployment in entry["deployments"][1:]:
        deployment["autoscaling_config"] = {
            "min_replicas": 0, "initial_replicas": 1, "max_replicas": 2,
            "target_ongoing_requests": 100,  # a second replica would be one for the queue
            "metrics_interval_s": 1, "look_back_period_s": 5, "upscale_delay_s": 0, "downscale_delay_s": 0,
        }  # fmt: skip
    with serve_application(entry, folder) as served:
        yield served


def test_models_sleep_and_ten_requests_at_once_wake_one_of_each_stage_with_the_same_bytes(
    sleepers: ServedApplication,
) -> None:
    before = pictures(sleepers)
    video = video_of(sleepers)
    awake_bytes = memory_of(sleepers)
    asleep_after_s = until(lambda: states(sleepers) == {"emoji-flux": "asleep", "emoji-wan": "asleep"})
    until(lambda: not processes_of(sleepers, *FLUX, *WAN))
    figures = {"memory awake": awake_bytes, "memory asleep": memory_of(sleepers), "asleep after s": asleep_after_s}
    starts = {name: started(sleepers, name) for name in (*FLUX, *WAN)}

    probe(sleepers, seconds=12)  # longer than Serve's look back, and than the interval of its metrics
    refused = sleepers.generate(**BODY | {"size": "17x17"})
    assert refused.status_code == 400
    assert states(sleepers) == {"emoji-flux": "asleep", "emoji-wan": "asleep"}
    assert processes_of(sleepers, *FLUX, *WAN) == []

    began = time.monotonic()
    assert pictures(sleepers) == before
    figures["ten pictures from sleep s"] = time.monotonic() - began
    for name in FLUX:
        assert started(sleepers, name) == starts[name] + 1
    assert started(sleepers, *WAN) == starts[WAN[0]]
    assert states(sleepers)["emoji-wan"] == "asleep"

    began = time.monotonic()
    job = httpx.post(f"{sleepers.url}/v1/videos", json=VIDEO, timeout=60).raise_for_status().json()
    figures["a video job accepted after s"] = time.monotonic() - began
    at_once = httpx.post(f"{sleepers.url}/v1/videos/generations", json=VIDEO | {"seed": 2}, timeout=60)
    assert at_once.status_code == 503
    assert at_once.json()["error"]["code"] == "model_loading"
    assert int(at_once.headers["retry-after"]) > 0
    figures["said to who waits"] = at_once.json()["error"]["message"]
    assert digest_of_video(sleepers, job["id"]) == video
    figures["a video from sleep s"] = time.monotonic() - began
    events = httpx.get(f"{sleepers.url}/v1/jobs/{job['id']}/events", timeout=60).text
    [waiting] = [json.loads(line[6:]) for line in events.splitlines() if '"for": "model"' in line]
    figures["said to the job"] = waiting
    assert started(sleepers, *WAN) == starts[WAN[0]] + 1
    cards = httpx.get(f"{sleepers.url}/v1/models", timeout=60).json()["data"]
    assert {each["id"]: each["state"] for each in cards}["emoji-wan"] == "ready"
    print(json.dumps(figures, indent=1))


def pictures(served: ServedApplication) -> list[str]:
    """The digests of ten, asked for at once."""

    def digest(seed: int) -> str:
        [item] = served.pictures(**BODY | {"seed": seed})
        return hashlib.sha256(item["b64_json"].encode()).hexdigest()

    with ThreadPoolExecutor(10) as threads:
        return list(threads.map(digest, range(10)))


def video_of(served: ServedApplication) -> str:
    job = httpx.post(f"{served.url}/v1/videos", json=VIDEO | {"seed": 1}, timeout=60).raise_for_status().json()
    VIDEO["seed"] = 1
    return digest_of_video(served, job["id"])


def digest_of_video(served: ServedApplication, video_id: str) -> str:
    url = f"{served.url}/v1/videos/{video_id}"
    until(lambda: httpx.get(url, timeout=60).json()["status"] in ("completed", "failed"))
    return hashlib.sha256(httpx.get(f"{url}/content", timeout=60).raise_for_status().content).hexdigest()


def probe(served: ServedApplication, seconds: float) -> None:
    """What watches a server asks of it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        assert served.health().status_code == 200
        for path in ("/v1/models", "/v1/models/emoji-wan", "/openapi.json", "/v1/loras", "/"):
            assert httpx.get(f"{served.url}{path}", timeout=60).status_code == 200
        time.sleep(1)


def processes_of(served: ServedApplication, *names: str) -> list[psutil.Process]:
    titles = tuple(f"ray::ServeReplica:triptych:{name}" for name in names)

    def title(process: psutil.Process) -> str:
        with suppress(psutil.NoSuchProcess):  # it ends, or has ended and nobody has taken note yet
            return (process.cmdline() or [""])[0]
        return ""

    return [each for each in served.processes() if title(each).startswith(titles)]


def memory_of(served: ServedApplication) -> int:
    """Bytes that the replicas of both models hold alone."""
    return sum(each.memory_full_info().uss for each in processes_of(served, *FLUX, *WAN))


def started(served: ServedApplication, name: str) -> int:
    """How often a replica of the deployment was started, as Serve says, until a model was last awake again.

    Later ones are for the queue.
    """
    log = served.log()
    return (log.rpartition("is awake after")[0] or log).count(f"Adding 1 replica to Deployment(name='{name}'")
