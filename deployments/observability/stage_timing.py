"""Times what each stage does for each request: a line in the log, and a JSON line in a file for scripts."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.messages import StageName
from deployments.observability.observer import ObservedReplica, Observer, StageWork

logger = logging.getLogger(__name__)

RECENT = 200  # requests whose timings are kept for the ingress


@dataclass
class StageTiming:
    """What one stage did for one request: a line of the file."""

    request_id: str
    stage: StageName
    replica: str = ""
    process_id: int = field(default_factory=os.getpid)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    queue_s: float = 0.0  # waiting for the stage's turn
    transfer_s: float = 0.0  # fetching and unpacking what the stage before sent
    compute_s: float = 0.0  # from start to end of the measurement, synchronised with the device
    steps: int = 0  # of the scheduler
    bytes_in: int = 0
    bytes_out: int = 0
    outcome: str = "ok"  # or the class of the exception


class StageTimer(Observer):
    """Writes timings; the file is shared by the replicas of a node, each line one append."""

    def __init__(self, file: Path, replica: str, synchronize: Callable[[], None]) -> None:
        """`synchronize` returns when the device has done all that it was given."""
        self.file = file
        self._replica = replica
        self._synchronize = synchronize
        self._recent: deque[StageTiming] = deque(maxlen=RECENT)
        file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def around(self, work: StageWork) -> Iterator[StageTiming]:
        timing = StageTiming(work.request.request_id, work.stage, self._replica, bytes_in=work.bytes_in)
        self._synchronize()
        start = time.perf_counter()
        timing.queue_s = time.time() - work.arrived
        timing.transfer_s = max(0.0, work.arrived - work.sent) if work.sent else 0.0
        self._recent.append(timing)
        try:
            yield timing
            self._synchronize()
        except BaseException as error:
            timing.outcome = type(error).__name__
            raise
        finally:
            timing.compute_s = time.perf_counter() - start
            timing.steps, timing.bytes_out = work.steps, work.bytes_out
            self._write(asdict(timing))

    def recall(self, request_id: str) -> list[dict[str, Any]]:
        return [asdict(timing) for timing in self._recent.copy() if timing.request_id == request_id]

    def forget(self) -> None:
        self._recent.clear()

    def _write(self, timing: dict[str, Any]) -> None:
        values = {key: f"{value:.6f}" if isinstance(value, float) else value for key, value in timing.items()}
        logger.info("stage timing: %s", " ".join(f"{key}={value}" for key, value in values.items()))
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, f"{json.dumps(timing)}\n".encode())
        finally:
            os.close(descriptor)


def make_stage_timer(replica: ObservedReplica) -> StageTimer | None:
    """With SGLANG_DIFFUSION_STAGE_LOGGING; the file lies under SGLANG_DIFFUSION_CACHE_ROOT."""
    runtime = replica.env.runtime
    if not runtime.stage_logging:
        return None
    return StageTimer(runtime.cache_root / "logs" / "performance.jsonl", replica.replica_id, replica.synchronize)


def read_requests(file: Path) -> list[dict[str, Any]]:
    """One record a request, in order of appearance: its id, its stages' timings, their sum in seconds."""
    stages_of: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        timing = json.loads(line)
        stages_of.setdefault(timing["request_id"], []).append(timing)
    return [
        {
            "request_id": request_id,
            "stages": stages,
            "total_s": sum(s["queue_s"] + s["transfer_s"] + s["compute_s"] for s in stages),
        }
        for request_id, stages in stages_of.items()
    ]
