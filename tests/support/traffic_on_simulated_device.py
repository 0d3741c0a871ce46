"""What crosses between host and device, and where threads wait for the device, counted on a simulated one.

    python -m tests.support.traffic_on_simulated_device FOLDER MODEL --steps 8 --requests 1 \
        --checkpoint-every 0 --placement three_stage

Prints JSON: of one request and of each further step, by the thread and the stream, how often and how many bytes.
"""

import argparse
import json
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import simulated_accelerator as simulated

DEVICE = "npu"
PARTS = {"three_stage": (("encoder",), ("denoiser",), ("vae",)), "one_stage": (("encoder", "denoiser", "vae"),)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--placement", choices=PARTS, default="three_stage")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    simulated.install(DEVICE)
    if hasattr(simulated, "install_streams"):
        simulated.install_streams(DEVICE)
    print(json.dumps(counted(asked)))


def counted(asked: argparse.Namespace) -> dict[str, Any]:
    from deployments.messages import GenerationRequest, OutputFormat
    from deployments.model import DenoisingArgs
    from deployments.stage_pipeline.loading import load_stage
    from deployments.stages.decode import decode_output
    from deployments.stages.denoise import DenoiserStage
    from deployments.stages.denoise_run import DenoisingFollower
    from deployments.stages.encode import encode
    from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

    tiny_patches()
    folder = checkpoint(asked.model, asked.folder)
    loaded = {stages: load_stage(folder, stages, DEVICE) for stages in PARTS[asked.placement]}
    held = {name: stage for stages, stage in loaded.items() for name in stages}
    denoiser = DenoiserStage(
        held["denoiser"],
        DenoisingArgs(max_wait_s=0.2, checkpoint_every=asked.checkpoint_every or 10**6),
        encode=lambda request: encode(held["encoder"], request),
    )
    stage_thread = threading.Lock()
    conditionings: list[int] = []

    def make(number: int, steps: int) -> None:
        arguments = request_arguments(asked.model) | {"num_inference_steps": steps}
        request = GenerationRequest(f"r{number}", asked.model, arguments, number, OutputFormat("image", "png"))
        follower = DenoisingFollower(checkpoint=(lambda _: None) if asked.checkpoint_every else None)
        with stage_thread, place("encode"):
            conditioning = encode(held["encoder"], request)
        conditionings.append(conditioning.calls.num_bytes)
        with place("request"):
            inputs, _ = denoiser.denoise(request, conditioning, follower=follower)
        with stage_thread, place("decode"):
            decode_output(held["vae"], request, inputs)

    for _ in range(2):  # the axes are learned and the first merge is verified
        together(make, asked.requests, asked.steps)
    seen = [count(make, asked.requests, steps) for steps in (asked.steps, 2 * asked.steps)]
    denoiser.engine.close()
    return {
        "conditioning_bytes": conditionings[-1],
        "per_request": seen[0],
        "per_step": {
            kind: less(seen[1][kind], seen[0][kind], asked.steps * asked.requests) for kind in ("copies", "waits")
        },
    }


def count(make: Any, num_requests: int, steps: int) -> dict[str, dict[str, list[int]]]:
    """Of all requests: thread / what / stream -> how often, how many bytes."""
    simulated.crossings.clear()
    simulated.waits.clear()
    together(make, num_requests, steps)
    copies = [
        (each, f"to the {each.to}{' waiting' * each.is_blocking}", each.num_bytes) for each in simulated.crossings
    ]
    waits = [(each, each.reason, 0) for each in simulated.waits]
    return {"copies": sums(copies), "waits": sums(waits)}


def sums(seen: list[tuple[Any, str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for each, what, num_bytes in seen:
        where = "a side stream" if each.stream else "the stream of the forwards"
        entry = found.setdefault(f"{each.thread.split('_')[0]}: {what}, {where}", [0, 0])
        entry[0] += 1
        entry[1] += num_bytes
    return found


def less(many: dict[str, list[int]], few: dict[str, list[int]], steps: int) -> dict[str, list[float]]:
    """What each of the further steps adds; what comes as often and is only longer (a schedule) is no step's."""
    added = {name: [(a - b) / steps for a, b in zip(many[name], few.get(name, [0, 0]), strict=True)] for name in many}
    return {name: values for name, values in added.items() if values[0]}


def together(make: Any, num_requests: int, steps: int) -> None:
    with ThreadPoolExecutor(num_requests, thread_name_prefix="request") as threads:
        list(threads.map(make, range(num_requests), [steps] * num_requests))


@contextmanager
def place(name: str) -> Iterator[None]:
    """Named by the thread, which is all that a copy knows of its maker."""
    thread = threading.current_thread()
    before, thread.name = thread.name, name
    try:
        yield
    finally:
        thread.name = before


if __name__ == "__main__":
    main()
