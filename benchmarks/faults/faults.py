"""FAULTS: what is done to which part of a running cluster, a row each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import psutil

from benchmarks.faults.cluster import FaultCluster

Find = Callable[[FaultCluster], list[psutil.Process]]
Act = Callable[[FaultCluster], None]
STOPPED_S, AWAY_S, SLOW_S = 40, 8, 20
SLICE_S, SHARE_AWAKE = 0.5, 0.1  # of a process that is slow


@dataclass(frozen=True)
class Fault:
    """`on` puts the cluster into trouble for `seconds`; what repairs it then is said in `repair`."""

    part: str
    kind: str
    on: Callable[[FaultCluster], AbstractContextManager[None]]
    seconds: float
    repair: str


def killed(part: str, find: Find) -> Fault:
    """Its supervisor (Serve, a replica) replaces it."""

    @contextmanager
    def on(cluster: FaultCluster) -> Iterator[None]:
        for process in find(cluster):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        yield

    return Fault(part, "killed", on, 0, "")


def stopped(part: str, find: Find, seconds: float = STOPPED_S) -> Fault:
    """SIGSTOP; what still lives gets SIGCONT at the end."""

    @contextmanager
    def on(cluster: FaultCluster) -> Iterator[None]:
        processes = find(cluster)
        signal_all(processes, psutil.Process.suspend)
        yield
        signal_all(processes, psutil.Process.resume)

    return Fault(part, "stopped", on, seconds, f"goes on after {seconds:.0f} s if it was not replaced")


def slow(part: str, find: Find) -> Fault:
    """Awake for a tenth of the time."""

    @contextmanager
    def on(cluster: FaultCluster) -> Iterator[None]:
        processes, is_over = find(cluster), threading.Event()

        def alternate() -> None:
            while not is_over.is_set():
                signal_all(processes, psutil.Process.suspend)
                time.sleep(SLICE_S * (1 - SHARE_AWAKE))
                signal_all(processes, psutil.Process.resume)
                time.sleep(SLICE_S * SHARE_AWAKE)

        thread = threading.Thread(target=alternate)
        thread.start()
        yield
        is_over.set()
        thread.join()

    return Fault(part, "slow", on, SLOW_S, f"for {SLOW_S:.0f} s")


def away(part: str, kind: str, lose: Act, bring_back: Act, seconds: float = AWAY_S) -> Fault:
    """Gone until somebody brings it back."""

    @contextmanager
    def on(cluster: FaultCluster) -> Iterator[None]:
        lose(cluster)
        yield
        bring_back(cluster)

    return Fault(part, kind, on, seconds, f"back after {seconds:.0f} s")


def signal_all(processes: list[psutil.Process], signal: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            signal(process)


def replicas(deployment: str) -> Find:
    return lambda cluster: cluster.replicas(deployment)


def titled(title: str) -> Find:
    return lambda cluster: cluster.processes(title)


def s3_processes(cluster: FaultCluster) -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.name() == "weed"]


# Those that Ray or a replica replaces when they are dead.
REPLACED: dict[str, Find] = {
    **{deployment.lower(): replicas(deployment) for deployment in ("Encoder", "Denoiser", "VAE", "Ingress")},
    "proxy": titled("ray::ProxyActor"),
    "controller": titled("ray::ServeController"),
    "media worker": FaultCluster.media_workers,
}
GCS, S3, DATABASE = titled("gcs_server"), s3_processes, lambda cluster: cluster.postgresql.processes()

FAULTS = (
    *(killed(part, find) for part, find in REPLACED.items()),
    *(stopped(part, find) for part, find in REPLACED.items()),
    *(slow(part, find) for part, find in REPLACED.items()),
    away("GCS", "killed", lambda cluster: cluster.ray.head_node.kill_gcs_server(), FaultCluster.restart_gcs),
    stopped("GCS", GCS, 15),
    slow("GCS", GCS),
    away("raylet", "node gone", FaultCluster.lose_second_node, FaultCluster.add_second_node),
    away("raylet", "killed", lambda cluster: cluster.second.kill_raylet(), FaultCluster.add_second_node),
    stopped("raylet", titled("raylet/raylet"), 15),
    slow("raylet", titled("raylet/raylet")),
    away("S3", "killed", lambda cluster: cluster.s3.kill(), lambda cluster: cluster.s3.start()),
    stopped("S3", S3, 60),
    slow("S3", S3),
    away("PostgreSQL", "killed", lambda cluster: cluster.postgresql.kill(), lambda cluster: cluster.postgresql.start()),
    stopped("PostgreSQL", DATABASE, 20),
    slow("PostgreSQL", DATABASE),
    away("ingress", "disk full", FaultCluster.fill_disk, FaultCluster.empty_disk),
)
