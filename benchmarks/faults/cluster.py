"""Two nodes of Ray on this machine that serve a picture model and a video model, with S3 and PostgreSQL beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

from benchmarks.served import ONE_THREAD, free_port
from tests.support.postgresql import PostgreSQL, installed_programs, postgresql_server
from tests.support.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parents[2]
APPLICATIONS = {"pictures": "emoji-flux", "videos": "emoji-wan"}  # by route, the checkpoint
FIRST, SECOND = "first", "second"  # nodes, each with a resource of its name
PLACES = {"Ingress": FIRST, "Encoder": FIRST, "Denoiser": SECOND, "VAE": SECOND}
DISK_MIB = 64
START_TIMEOUT_S = 600


@dataclass
class FaultCluster:
    """What is running, and the processes of each part of it."""

    url: str
    ray: Cluster
    second: Node  # where the denoisers and the VAEs run
    s3: S3Server
    postgresql: PostgreSQL
    disk: Path  # a small volume of its own: the cache root of every replica
    folder: Path  # RAY_TMPDIR, by which the processes of this cluster are known
    applications: Mapping[str, str]  # by route, the checkpoint

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of Ray's processes in whose command line the title stands, without their forks."""
        found = [process for process in psutil.process_iter() if self._is_ours(process, title)]
        return [process for process in found if process.ppid() not in {each.pid for each in found}]

    def _is_ours(self, process: psutil.Process, title: str) -> bool:
        with suppress(psutil.Error):
            return title in " ".join(process.cmdline()) and process.environ().get("RAY_TMPDIR") == str(self.folder)
        return False

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """One of each application."""
        return [
            process
            for name in self.applications
            for process in self.processes(f"ray::ServeReplica:{name}:{deployment}")
        ]

    def media_workers(self) -> list[psutil.Process]:
        return [child for vae in self.replicas("VAE") for child in vae.children()]

    def lose_second_node(self) -> None:
        """At once, as by a power cut."""
        self.ray.remove_node(self.second, allow_graceful=False)

    def add_second_node(self) -> None:
        self.second = add_node(self.ray)

    def restart_gcs(self) -> None:
        """As a head node's supervisor does; what the GCS knew is in RocksDB."""
        self.ray.head_node.start_gcs_server()

    def logs(self) -> str:
        """What the ingress replicas logged."""
        files = sorted(self.folder.glob("ray/session_2*/logs/serve/replica_*Ingress*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def fill_disk(self) -> None:
        with (self.disk / "filling").open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    def empty_disk(self) -> None:
        (self.disk / "filling").unlink(missing_ok=True)

    def is_healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            urls = [f"{self.url}/{name}/health" for name in self.applications]
            return all(httpx.get(url, timeout=5).status_code == 200 for url in urls)
        return False

    def wait_until_healthy(self) -> None:
        """Raises TimeoutError."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            if time.monotonic() > give_up:
                raise TimeoutError(f"not healthy after {START_TIMEOUT_S} s: see {self.folder}")
            time.sleep(0.5)


@contextmanager
def fault_cluster(applications: Mapping[str, str] = APPLICATIONS) -> Iterator[FaultCluster]:
    """Raises RuntimeError without PostgreSQL, or without the right to mount a volume."""
    programs = installed_programs()
    if programs is None or os.geteuid() != 0:
        raise RuntimeError("the faults need an installed PostgreSQL (Debian: postgresql), and root for a small volume")
    with ExitStack() as cleaning:
        folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))  # short: Ray's sockets in it have 107 characters
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        disk = cleaning.enter_context(small_volume(folder / "disk"))
        s3 = cleaning.enter_context(s3_server())
        s3.create_bucket("outputs")
        postgresql = cleaning.enter_context(postgresql_server(programs))
        os.environ.update(environment(folder))
        # Ray's own way to end nodes at exit sets a signal handler, which the thread that adds a node again may not.
        head = {"num_cpus": 8, "resources": {FIRST: 10}}
        ray = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        cleaning.callback(ray.shutdown)
        second = add_node(ray)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        cluster = FaultCluster(url, ray, second, s3, postgresql, disk, folder, applications)
        deploy(f"http://{ray.head_node.webui_url}", serve_config(cluster, port))
        cluster.wait_until_healthy()
        yield cluster


def add_node(ray: Cluster) -> Node:
    return ray.add_node(num_cpus=8, resources={SECOND: 10})


def environment(folder: Path) -> dict[str, str]:
    """Of every process of the cluster. A GCS that writes to RocksDB may die: see docs/operations.md."""
    return ONE_THREAD | {
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "gcs"),
    }


def serve_config(cluster: FaultCluster, port: int) -> dict[str, Any]:
    """The applications, in the form of a Serve config file."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application(name, model, cluster) for name, model in cluster.applications.items()],
    }


def application(name: str, model: str, cluster: FaultCluster) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "serve_app.app:build_app",
        "runtime_env": {
            "env_vars": {
                "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu",
                "SGLANG_DIFFUSION_CACHE_ROOT": str(cluster.disk),
                "SGLANG_CLOUD_STORAGE_TYPE": "s3",
                "SGLANG_S3_BUCKET_NAME": "outputs",
                "SGLANG_S3_ENDPOINT_URL": cluster.s3.endpoint,
                "SGLANG_S3_ACCESS_KEY_ID": cluster.s3.access_key,
                "SGLANG_S3_SECRET_ACCESS_KEY": cluster.s3.secret_key,
            }
        },
        "args": {
            "model": str(ROOT / "checkpoints" / model),
            "limits": {"max_steps": 1000},
            "jobs": {"store_url": cluster.postgresql.create_database(name)},
        },
        "deployments": [
            {"name": deployment, "ray_actor_options": {"num_cpus": 0.1, "resources": {place: 0.1}}}
            for deployment, place in PLACES.items()
        ],
    }


def deploy(dashboard: str, config: dict[str, Any]) -> None:
    """As `serve deploy` does, as soon as the dashboard answers."""
    give_up = time.monotonic() + 60
    while True:
        try:
            httpx.put(f"{dashboard}/api/serve/applications/", json=config, timeout=60).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


@contextmanager
def small_volume(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    run: Callable[..., Any] = subprocess.run
    run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        run(["umount", "--lazy", str(folder)], check=False)
