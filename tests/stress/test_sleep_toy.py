"""The real ingress, controller and policy with stages without torch: a model sleeps and is woken many times."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.asleep import states, until
from tests.support.served_application import ServedApplication, serve_application

pytestmark = pytest.mark.timeout(1800)

STAGES = ("Encoder-toy", "Denoiser-toy", "VAE-toy")
IDLE_S = 8
ROUNDS = 3


def entry(folder: Path) -> dict[str, Any]:
    scaling = {
        "min_replicas": 0, "initial_replicas": 1, "max_replicas": 2, "metrics_interval_s": 1,
        "look_back_period_s": 3, "upscale_delay_s": 0, "downscale_delay_s": 0, "target_ongoing_requests": 100,
    }  # fmt: skip
    return {
        "name": "triptych",
        "route_prefix": "/",
        "import_path": "tests.support.sleeping_toy:build_app",
        "args": {"output_directory": str(folder / "outputs")},
        "autoscaling_policy": {
            "policy_function": "serve_app.autoscaling:ReplicaRatio",
            "policy_kwargs": {"idle_s": IDLE_S},
        },
        "deployments": [
            {"name": "Ingress", "graceful_shutdown_timeout_s": 5},
            *({"name": name, "ray_actor_options": {"num_cpus": 0.1}, "autoscaling_config": scaling} for name in STAGES),
        ],
    }


def test_a_model_sleeps_and_wakes_again_and_again_with_one_load_each_time(tmp_path: Path) -> None:
    with serve_application(entry(tmp_path), tmp_path) as served:
        before = pictures(served)
        for turn in range(ROUNDS):
            until(lambda: states(served) == {"toy": "asleep"})
            for _ in range(6):  # longer than the look back
                assert served.health().status_code == 200
                assert httpx.get(f"{served.url}/v1/models/toy", timeout=60).json()["state"] == "asleep"
                time.sleep(1)
            assert served.generate(prompt="a cat", model="toy", size="17x17").status_code == 400
            assert states(served) == {"toy": "asleep"}
            began = time.monotonic()
            assert pictures(served) == before
            print(f"turn {turn}: ten pictures from sleep in {time.monotonic() - began:.1f} s")
            for name in STAGES:
                assert served.log().count(f"Adding 1 replica to Deployment(name='{name}'") == turn + 2
        work_until(served, time.monotonic() + 4 * IDLE_S)
        assert served.log().count("Adding 1 replica to Deployment(name='Encoder-toy'") == ROUNDS + 1


def pictures(served: ServedApplication) -> list[str]:
    def digest(seed: int) -> str:
        [item] = served.pictures(prompt="a cat", model="toy", seed=seed)
        return hashlib.sha256(item["b64_json"].encode()).hexdigest()

    with ThreadPoolExecutor(10) as threads:
        return list(threads.map(digest, range(10)))


def work_until(served: ServedApplication, ends: float) -> None:
    """A request just before the model would go to sleep, each time: none finds it going."""
    while time.monotonic() < ends:
        served.pictures(prompt="a cat", model="toy", seed=1)
        time.sleep(IDLE_S - 0.5)
