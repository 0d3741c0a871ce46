"""A Ray cluster on this machine whose nodes come and go by Ray's own autoscaler, with S3 and PostgreSQL beside it.

The autoscaler and the raylets are real; the machines are not: Ray's fake provider starts a further raylet for each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster

from benchmarks.faults.cluster import deploy
from benchmarks.served import ONE_THREAD
from tests.support.postgresql import PostgreSQL, installed_programs, postgresql_server
from tests.support.s3_server import S3Server, s3_server
from tests.support.served_application import ROOT, free_port

HEAD, PLACE = "head", "place"  # resources: of the head node, and one for a denoiser on each node that comes
MOST_NODES = 2  # beside the head
START_TIMEOUT_S = 600
IDLE_MINUTES = 0.3  # then a node goes
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
TWO_MODELS: dict[str, Any] = {
    "models": {
        "flux": {
            "model": str(ROOT / "checkpoints/emoji-flux"),
            "placement": "two_stage",
            "limits": {"max_steps": 1000},
        },
        "wan": {"model": str(ROOT / "checkpoints/emoji-wan"), "placement": "one_stage", "limits": {"max_steps": 1000}},
    },
    "jobs": {"lease_s": 5},
}


@dataclass(frozen=True)
class Replica:
    """What Serve's controller says of one."""

    state: str
    node_id: str
    pid: int


@dataclass
class AutoscaledCluster:
    """What is running; `deploy` changes what is served."""

    port: int
    ray: Cluster
    s3: S3Server
    postgresql: PostgreSQL
    folder: Path  # RAY_TMPDIR, by which the processes of this cluster are known

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.ray.head_node.webui_url}"

    def deploy(
        self, args: dict[str, Any], deployments: Mapping[str, dict[str, Any]], policy: dict[str, Any] | None = None
    ) -> None:
        """As `serve deploy` does: `deployments` are Serve's options by their names."""
        s3 = self.s3
        application = {
            "name": "triptych",
            "route_prefix": "/",
            "import_path": "serve_app.app:build_app",
            "runtime_env": {
                "env_vars": {
                    "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu",
                    "SGLANG_DIFFUSION_CACHE_ROOT": str(self.folder / "cache"),
                    "SGLANG_CLOUD_STORAGE_TYPE": "s3",
                    "SGLANG_S3_BUCKET_NAME": "outputs",
                    "SGLANG_S3_ENDPOINT_URL": s3.endpoint,
                    "SGLANG_S3_ACCESS_KEY_ID": s3.access_key,
                    "SGLANG_S3_SECRET_ACCESS_KEY": s3.secret_key,
                }
            },
            "args": args | {"jobs": {**args["jobs"], "store_url": f"{self.postgresql.url}/jobs"}},
            "deployments": [{"name": name, **options} for name, options in deployments.items()],
        }
        if policy is not None:
            application["autoscaling_policy"] = policy
        http = {"host": "127.0.0.1", "port": self.port}
        deploy(self.dashboard, {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]})

    def application(self) -> dict[str, Any]:
        """What Serve's REST API says of it."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=60).raise_for_status()
        application: dict[str, Any] = answer.json()["applications"]["triptych"]
        return application

    def replicas(self, deployment: str) -> list[Replica]:
        told = self.application()["deployments"].get(deployment, {}).get("replicas", [])
        return [Replica(each["state"], each.get("node_id") or "", each.get("pid") or 0) for each in told]

    def running(self, deployment: str) -> list[Replica]:
        return [each for each in self.replicas(deployment) if each.state == "RUNNING"]

    def nodes(self) -> set[str]:
        """The ids of those that the autoscaler has brought, and that live."""
        table = self.ray.global_state.node_table()
        return {node["NodeID"] for node in table if node["Alive"] and PLACE in node["Resources"]}

    def lose(self, node_id: str) -> None:
        """At once, as by a power cut."""
        for raylet in self._processes("raylet/raylet"):
            with suppress(psutil.Error):
                if f"--node_id={node_id}" in raylet.cmdline():
                    for process in [raylet, *raylet.children(recursive=True)]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()

    def give_notice(self, node_id: str, seconds: int) -> None:
        """That the node will be gone after so many seconds, as the controllers of spot instances do."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
        command = ["drain-node", "--address", self.ray.address, "--node-id", node_id, *reason]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command, "--deadline-remaining-seconds", str(seconds)],
            check=True,
            capture_output=True,
            timeout=120,
        )

    def logs(self, of: str) -> str:
        """What the replicas of a deployment logged, those that are gone too."""
        files = sorted(self.folder.glob(f"ray/session_2*/logs/serve/replica_*{of}*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def wait_until(self, what: str, is_so: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> float:
        """The seconds that it took. Raises TimeoutError that says what has not come."""
        began = time.monotonic()
        while True:
            with suppress(httpx.HTTPError, KeyError):
                if is_so():
                    return time.monotonic() - began
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; see {self.folder}")
            time.sleep(1)

    def wait_until_healthy(self) -> float:
        return self.wait_until("healthy", lambda: httpx.get(f"{self.url}/health", timeout=10).status_code == 200)

    def _processes(self, title: str) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process, title)]

    def _is_ours(self, process: psutil.Process, title: str) -> bool:
        with suppress(psutil.Error):
            return title in " ".join(process.cmdline()) and process.environ().get("RAY_TMPDIR") == str(self.folder)
        return False

    def end_all(self) -> None:
        """The fake provider leaves the nodes that it has started behind."""
        for process in self._processes(""):
            with suppress(psutil.NoSuchProcess):
                if process.pid != os.getpid():
                    process.kill()


@contextmanager
def autoscaled_cluster() -> Iterator[AutoscaledCluster]:
    """Without any application. Raises RuntimeError without PostgreSQL."""
    programs = installed_programs()
    if programs is None:
        raise RuntimeError("it needs an installed PostgreSQL (Debian: postgresql)")
    with ExitStack() as cleaning:
        folder = Path(tempfile.mkdtemp(prefix="cluster-", dir="/tmp"))  # short: Ray's sockets in it have 107 characters
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        s3 = cleaning.enter_context(s3_server())
        s3.create_bucket("outputs")
        postgresql = cleaning.enter_context(postgresql_server(programs))
        postgresql.create_database("jobs")
        gcs_port = free_port()
        (folder / "autoscaling.yaml").write_text(json.dumps(autoscaling_config(gcs_port)))
        with changed_environment(environment(folder) | HEAD_IDENTITY):
            head = {
                "num_cpus": 8,
                "resources": {HEAD: 10, "denoiser": 1},
                "autoscaling_config": str(folder / "autoscaling.yaml"),
                "gcs_server_port": gcs_port,
                "node_ip_address": "127.0.0.1",
            }
            ray = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        with changed_environment(environment(folder)):
            cluster = AutoscaledCluster(free_port(), ray, s3, postgresql, folder)
            cleaning.callback(cluster.end_all)
            cleaning.callback(ray.shutdown)
            yield cluster


# Only of the head: a node that joins has an identity of its own, which the provider gives it.
HEAD_IDENTITY = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}


def environment(folder: Path) -> dict[str, str]:
    """Of every process of the cluster."""
    return ONE_THREAD | {
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_OVERRIDE_RESOURCES": "{}",  # tests/stress/conftest.py gives every node a device
        "RAY_raylet_start_wait_time_s": "300",  # on a busy machine a node that is given up leaves processes behind
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


def autoscaling_config(gcs_port: int) -> dict[str, Any]:
    """Of a cluster whose nodes come when a replica finds no `place`."""
    place = {"CPU": 4, PLACE: 1, "object_store_memory": 100_000_000}
    lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )  # fmt: skip
    return {
        "cluster_name": "stress",
        "max_workers": MOST_NODES,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{gcs_port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,  # the provider starts Ray itself
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 8}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": place, "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


@contextmanager
def changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
