"""Count where the host waits for a simulated device while requests are denoised.

    python -m tests.support.host_syncs MODEL FOLDER REQUESTS STEPS

FOLDER holds the checkpoints, REQUESTS run at once. Counted in the engine's thread, from the second time on that such
requests run: device-wide synchronisations, waits for an event behind which the device had nothing to do, questions that
need the device's answer, and copies between host and device.
"""

import json
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployments.messages import GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from tests.support import simulated_accelerator
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

QUESTIONS = ("_local_scalar_dense", "aten.equal", "nonzero", "is_nonzero", "_unique2", "masked_select")


class Dispatched(list[str]):
    """The operations of the device; those of the engine's thread that the host waits for are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def append(self, name: str) -> None:
        super().append(name)
        if threading.current_thread().name == "engine" and any(question in name for question in QUESTIONS):
            self.counts["questions"] += 1


@contextmanager
def counted(dispatched: Dispatched) -> Iterator[Counter[str]]:
    events = simulated_accelerator.events_waited_for
    dispatched.counts.clear()
    before = len(simulated_accelerator.synchronized), len(events)
    yield dispatched.counts
    dispatched.counts["device-wide"] = len(simulated_accelerator.synchronized) - before[0]
    waits = events[before[1] :]
    dispatched.counts["idle waits"] = sum(behind == 0 for behind in waits)
    dispatched.counts["waits for an earlier turn"] = sum(behind > 0 for behind in waits)


def count(name: str, root: Path, num_requests: int, steps: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    dispatched = simulated_accelerator.dispatched = Dispatched()
    simulated_accelerator.install("npu")
    tiny_patches()
    folder, device = checkpoint(name, root), torch.device("npu")
    encoder, denoiser = (load_stage(folder, (stage,), device) for stage in ("encoder", "denoiser"))
    stage = DenoiserStage(
        denoiser, DenoisingArgs(max_wait_s=0.5, merging="always"), encode=lambda request: encode(encoder, request)
    )
    arguments = {**request_arguments(name), "num_inference_steps": steps}

    def run(number: int) -> None:
        request = GenerationRequest(f"request {number}", name, dict(arguments), number, OutputFormat("image", "png"))
        stage.denoise(request, encode(encoder, request))

    def run_all() -> None:
        with ThreadPoolExecutor(num_requests) as threads:
            list(threads.map(run, range(num_requests)))

    run(0)  # learns the axes
    run_all()  # verifies the merge
    with counted(dispatched) as counts:
        run_all()
    stage.engine.close()
    return {**counts, "merged": stage.engine.statistics.merged}


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
