"""Serve a checkpoint on a Ray cluster of two raylets and tell what came of it, as test_served.py asks.

The encoder and the ingress run on one node, denoiser and VAE on the other. The variables come by the three
ways there are: inherited from the process that started Ray (the S3 keys), `env_vars` of the application, and
`env_vars` of one deployment over them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from tests.support.served_application import DEFAULT_ARGUMENTS, START_TIMEOUT_S, free_port

PLACES = {"Ingress": "first", "Encoder": "first", "Denoiser": "second", "VAE": "second"}
OVERRIDES = {
    "Denoiser": {"SGLANG_CACHE_DIT_FN": "2"},
    "VAE": {"SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD": "spawn", "SGLANG_DIFFUSION_STAGE_LOGGING": "false"},
}
PROMPT = "a small cat"


def main(settings: dict[str, Any]) -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"first": 10}})
    try:
        cluster.add_node(num_cpus=2, resources={"second": 10})
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        port = free_port()
        client = serve_start({"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        config = ServeDeploySchema.model_validate({"applications": [application(settings)]})
        client.deploy_apps(config, _blocking=False)  # its own wait ends after a minute
        wait_until_running(client)
        report = ask(f"http://127.0.0.1:{port}", settings)
        report["session_folder"] = ray._private.worker._global_node.get_session_dir_path()
        return report
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def wait_until_running(client: Any) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while (status := client.get_serve_status("triptych").app_status).status != "RUNNING":
        assert status.status != "DEPLOY_FAILED", status.message
        assert time.monotonic() < give_up, status.message
        time.sleep(0.5)


def application(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "triptych",
        "route_prefix": "/",
        "import_path": "serve_app.app:build_app",
        "runtime_env": {"env_vars": settings["variables"]},
        "args": {"model": settings["checkpoint"], "default_arguments": DEFAULT_ARGUMENTS},
        "deployments": [
            {
                "name": name,
                "graceful_shutdown_timeout_s": 2,
                "ray_actor_options": {
                    "num_cpus": 0.1,
                    "resources": {place: 0.01},
                    "runtime_env": {"env_vars": OVERRIDES.get(name, {})},
                },
            }
            for name, place in PLACES.items()
        ],
    }


def ask(url: str, settings: dict[str, Any]) -> dict[str, Any]:
    with httpx.Client(base_url=url, timeout=120) as client:
        body = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 12}
        made = client.post("/v1/images/generations", json=body)
        refused = client.post("/v1/images/generations", json={**body, "cache_dit": {"Fn_compute_blocks": 0}})
        uncached = client.post("/v1/images/generations", json={**body, "enable_cache_dit": False})
        started = client.post("/dev/profiler/start", json={"max_s": 20})
        stopped = client.post("/dev/profiler/stop")
        return {
            "made": made.json(),
            "refused": {"status": refused.status_code, **refused.json()},
            "uncached": uncached.json(),
            "profiler": [started.json(), stopped.json()],
            "dev": {path: client.get(f"/dev/{path}").json() for path in ("config", "replicas", "cache_dit", "caches")},
            "stacks": client.get("/dev/stacks").text,
            "health": client.get("/health").json(),
            "openapi": client.get("/openapi.json").text,
            "nodes": {node["NodeID"]: sorted(set(node["Resources"]) & set(PLACES.values())) for node in ray.nodes()},
        }


if __name__ == "__main__":
    settings_file, report_file = Path(sys.argv[1]), Path(sys.argv[2])
    report_file.write_text(json.dumps(main(json.loads(settings_file.read_text()))))
