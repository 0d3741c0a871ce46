"""A Ray cluster on this machine whose nodes come and go by Ray's own autoscaler.

The autoscaler and the raylets are real; the machines are not: Ray's fake provider starts a further raylet for each.
Replicas start as forks of a process that has the libraries, so that a new one takes a second and not a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from benchmarks.faults.cluster import deploy
from benchmarks.served import ONE_THREAD
from tests.support.fake_machines import time_to_start
from tests.support.forking.command import forks_of_all_nodes_in
from tests.support.served_application import FORKS, ROOT, free_port

HEAD, PLACE = "head", "place"  # resources: of the head node, and one for a denoiser on each node that comes
MOST_NODES = 2  # beside the head
START_TIMEOUT_S = 600
IDLE_MINUTES = 0.3  # then a node goes
PROVIDER = "tests.support.fake_machines.FakeMachines"


@dataclass(frozen=True)
class Replica:
    """What Serve's controller says of one."""

    state: str
    node_id: str
    pid: int


@dataclass
class AutoscaledCluster:
    """What is running; `deploy` changes what is served."""

    entry: dict[str, Any]  # what the application always has, with some of its `args`
    port: int
    gcs_port: int
    ray: Cluster
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
        application = self.entry | {
            "name": "triptych",
            "route_prefix": "/",
            "runtime_env": FORKS | self.entry["runtime_env"],
            "args": self.entry["args"] | args,
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

    def lose_all(self) -> None:
        """The head and every other node at once, and what the cluster knew; with them the servers of forks."""
        for process in self._processes(""):
            with suppress(psutil.NoSuchProcess):
                if process.pid != os.getpid():
                    process.kill()
        for path in self.folder.iterdir():
            if path.is_socket():
                path.unlink()

    def start_again(self) -> None:
        """A new head at the old address, without applications."""
        self.ray = started_head(self.folder, self.gcs_port)

    def give_notice(self, node_id: str, seconds: int) -> None:
        """That the node will be gone after so many seconds: as `ray drain-node`, without the start of its process."""
        accepted, why_not = GcsClient(address=self.ray.address).drain_node(
            node_id, DRAIN_NODE_REASON_PREEMPTION, "the machine is taken away", int((time.time() + seconds) * 1000)
        )
        if not accepted:
            raise RuntimeError(f"the notice was refused: {why_not}")

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

    def wait_until_served(self, deployments: Collection[str]) -> float:
        """These and no others, each with replicas that it was last told to have, and healthy."""

        def is_served() -> bool:
            told = self.application()
            served = told["status"] == "RUNNING" and set(told["deployments"]) == set(deployments)
            return served and httpx.get(f"{self.url}/health", timeout=10).status_code == 200

        return self.wait_until("served", is_served)

    def _processes(self, title: str) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process, title)]

    def _is_ours(self, process: psutil.Process, title: str) -> bool:
        with suppress(psutil.Error):
            return title in " ".join(process.cmdline()) and process.environ().get("RAY_TMPDIR") == str(self.folder)
        return False


@contextmanager
def autoscaled_cluster(entry: dict[str, Any], idle_minutes: float = IDLE_MINUTES) -> Iterator[AutoscaledCluster]:
    """Without an application: `entry` has the `import_path`, `runtime_env` and first `args` of a later one."""
    with ExitStack() as cleaning:
        folder = Path(tempfile.mkdtemp(prefix="cluster-", dir="/tmp"))  # short: Ray's sockets in it have 107 characters
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        cleaning.enter_context(changed_environment(environment(folder)))
        gcs_port = free_port()
        (folder / "autoscaling.yaml").write_text(json.dumps(autoscaling_config(gcs_port, idle_minutes)))
        cluster = AutoscaledCluster(entry, free_port(), gcs_port, started_head(folder, gcs_port), folder)
        cleaning.callback(cluster.lose_all)  # the fake provider leaves the nodes that it has started behind
        cleaning.callback(lambda: cluster.ray.shutdown())
        yield cluster


def started_head(folder: Path, gcs_port: int) -> Cluster:
    head = {
        "num_cpus": 8,
        "resources": {HEAD: 10, "denoiser": 1},
        "autoscaling_config": str(folder / "autoscaling.yaml"),
        "gcs_server_port": gcs_port,
        "node_ip_address": "127.0.0.1",
    }
    with changed_environment(HEAD_IDENTITY), time_to_start():
        return Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)


# Only of the head: a node that joins has an identity of its own, which the provider gives it.
HEAD_IDENTITY = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}


def environment(folder: Path) -> dict[str, str]:
    """Of every process of the cluster."""
    return {
        **ONE_THREAD,
        **forks_of_all_nodes_in(folder),
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_OVERRIDE_RESOURCES": "{}",  # tests/stress/conftest.py gives every node a device
        # A busy machine takes its time; a node that is given up leaves processes behind.
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_agent_register_timeout_ms": "900000",
        "RAY_worker_register_timeout_seconds": "900",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",  # a slow proxy is ended with all its connections
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "100",
        "RAY_health_check_timeout_ms": "60000",  # of a raylet that is slow; one that is gone is noticed as before
        "RAY_prestart_worker_first_driver": "0",  # of which none is used: replicas have a `runtime_env`
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


def autoscaling_config(gcs_port: int, idle_minutes: float) -> dict[str, Any]:
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
        "idle_timeout_minutes": idle_minutes,
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
