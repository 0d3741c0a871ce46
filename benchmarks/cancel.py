"""How soon a cancelled request leaves the denoiser, and what a server without cancel would have worked for nobody.

    python -m benchmarks.cancel [--config FILE] [--model FOLDER] [--cancels N] [--steps N] [--port N]

Callers of the served application hang up (they close their connection) or POST /v1/jobs/{id}/cancel at random
moments of the denoising. The denoiser's own record of the request (logs/performance.jsonl) says when it left.
Writes docs/benchmarks/cancel.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks import report
from benchmarks.request_parts import at
from benchmarks.served import Served, served

BODY = {"prompt": "a big fox on an orange background", "max_sequence_length": 128}
MOMENTS = (0.15, 0.9)  # of the time of an undisturbed request
WARM_UPS, UNDISTURBED = 2, 5
TIMEOUT_S = 60.0
POLL_S = 0.01
Line = dict[str, Any]  # of performance.jsonl


@dataclass(frozen=True)
class Cancel:
    """One cancelled request; seconds after the cancel."""

    freed_s: float  # until the denoiser had let go of it
    remaining_s: float  # until the denoiser would have been done with it
    answered_s: float | None = None  # until the answer to the cancel came, where there is one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("ray_configs/serve_emoji_cpu.yaml"))
    parser.add_argument("--cancels", type=int, default=20, help="of each way")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path, help="a checkpoint folder, in place of that of the config")
    parser.add_argument("--port", type=int, default=0, help="of the application; default: a free one")
    options = parser.parse_args()
    variables = {"SGLANG_DIFFUSION_SERVER_DEV_MODE": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="triptych-cancel-") as folder,
        served(options.config, Path(folder), options.port, options.model, **variables) as application,
    ):
        result = measure(application, options.steps, options.cancels)
    result = {"machine": report.machine(), "config": options.config.name, **result}
    report.write("cancel", result, as_markdown(result))


def measure(application: Served, steps: int, cancels: int) -> dict[str, Any]:
    body, choice = BODY | {"num_inference_steps": steps}, random.Random(0)
    for _ in range(WARM_UPS):
        undisturbed(application, body)
    alone = [undisturbed(application, body) for _ in range(UNDISTURBED)]
    total_s = statistics.median(total for total, _ in alone)
    denoise_s = statistics.median(line["compute_s"] for _, line in alone)
    ways = {}
    for name, way in WAYS.items():
        made: list[Cancel] = []
        missed = 0
        while len(made) < cancels:
            number = len(denoised(application))
            cancelled_at, answered_s = way(application, body, choice.uniform(*MOMENTS) * total_s)
            cancel = cancel_of(next_denoised(application, number), cancelled_at, denoise_s, answered_s)
            if cancel is None:
                missed += 1
            else:
                made.append(cancel)
            if missed > 2 * cancels:
                raise RuntimeError(f"{name}: most cancels came when the denoiser was done")
        ways[name] = {"missed": missed, **summary(made, denoise_s / steps), "cancels": [asdict(each) for each in made]}
        print({key: value for key, value in ways[name].items() if key != "cancels"}, flush=True)
    refuse_requests_left(application)
    undisturbed(application, body)  # it still serves
    return {"steps": steps, "total_s": total_s, "denoise_s": denoise_s, "step_s": denoise_s / steps, "ways": ways}


def undisturbed(application: Served, body: dict[str, Any]) -> tuple[float, Line]:
    """Seconds of the whole request, and the denoiser's record of it."""
    number = len(denoised(application))
    started = time.perf_counter()
    httpx.post(f"{application.url}/v1/images/generations", json=body, timeout=TIMEOUT_S).raise_for_status()
    return time.perf_counter() - started, next_denoised(application, number)


def hang_up(application: Served, body: dict[str, Any], delay_s: float) -> tuple[float, float | None]:
    """A synchronous request whose connection is closed; time.time() of that."""
    address = urlsplit(application.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
    time.sleep(delay_s)
    cancelled_at = time.time()
    connection.close()
    return cancelled_at, None


def cancel_job(application: Served, body: dict[str, Any], delay_s: float) -> tuple[float, float | None]:
    """The same work as a job; time.time() of the POST, and the seconds until it was answered."""
    prefer = {"Prefer": "respond-async"}
    with httpx.Client(base_url=application.url, timeout=TIMEOUT_S) as client:
        started = time.perf_counter()
        job = client.post("/v1/images/generations", json=body, headers=prefer).raise_for_status().json()
        time.sleep(max(0.0, delay_s - (time.perf_counter() - started)))
        cancelled_at = time.time()
        answer = client.post(f"/v1/jobs/{job['id']}/cancel")
        answered_s = time.time() - cancelled_at
    if answer.status_code != 409:  # 409: it was completed before
        answer.raise_for_status()
    return cancelled_at, answered_s


WAYS: dict[str, Callable[[Served, dict[str, Any], float], tuple[float, float | None]]] = {
    "hang up": hang_up,
    "cancel a job": cancel_job,
}


def denoised(application: Served) -> list[Line]:
    """The denoiser's records of the requests that have left it."""
    return [line for line in application.lines("performance.jsonl") if line["stage"] == "denoiser"]


def next_denoised(application: Served, number: int) -> Line:
    """The record that follows the first `number`, as soon as it is there."""
    give_up = time.monotonic() + TIMEOUT_S
    while len(lines := denoised(application)) <= number:
        if time.monotonic() > give_up:
            raise RuntimeError(f"no request has left the denoiser in {TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    return lines[number]


def cancel_of(line: Line, cancelled_at: float, denoise_s: float, answered_s: float | None) -> Cancel | None:
    """What the record of a request says of its cancel; None if the denoiser was done before it.

    `denoise_s`: seconds that the denoiser takes for the whole request. One that went on to its end counts.
    """
    began_at = at(line["started_at"])
    freed_s = began_at + line["compute_s"] - cancelled_at
    return Cancel(freed_s, began_at + denoise_s - cancelled_at, answered_s) if freed_s > 0 else None


def summary(cancels: Sequence[Cancel], step_s: float) -> dict[str, Any]:
    freed_s = [cancel.freed_s for cancel in cancels]
    answered_s = [cancel.answered_s for cancel in cancels if cancel.answered_s is not None]
    return {
        "number": len(cancels),
        "freed_s": statistics.median(freed_s),
        "largest_freed_s": max(freed_s),
        "largest_in_steps": max(freed_s) / step_s,
        "remaining_s": statistics.median(cancel.remaining_s for cancel in cancels),
        "share_of_remaining": sum(freed_s) / sum(cancel.remaining_s for cancel in cancels),
        "answered_s": statistics.median(answered_s) if answered_s else None,
    }


def refuse_requests_left(application: Served) -> None:
    """Raises RuntimeError if a stage still has a request."""
    replicas = httpx.get(f"{application.url}/dev/replicas", timeout=TIMEOUT_S).raise_for_status().json()
    left = [request for each in replicas.values() for replica in each for request in replica["requests"]]
    if left:
        raise RuntimeError(f"cancelled requests are still there: {left}")


def as_markdown(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    heads = ("way", "cancels", "denoiser free after", "largest", "largest in steps", "would have gone on for",
             "work for nobody, of what it would be without cancel", "answer to the cancel")  # fmt: skip
    rows = [
        (name, str(way["number"]), ms(way["freed_s"]), ms(way["largest_freed_s"]), f"{way['largest_in_steps']:.1f}",
         ms(way["remaining_s"]), f"{way['share_of_remaining']:.1%}", ms(way["answered_s"]))
        for name, way in result["ways"].items()
    ]  # fmt: skip
    return [
        f"# Cancels over HTTP ({result['config']}, {machine['cores']} cores, load average "
        f"{machine['load_average'][0]:.1f})",
        "",
        f"`python -m benchmarks.cancel`: requests of {result['steps']} steps of {1e3 * result['step_s']:.0f} ms, "
        f"{result['total_s']:.2f} s undisturbed, cancelled at random moments of the denoising; medians. Free: the "
        "denoiser's own record of the request has ended, so its thread, its memory and its place in the batch are "
        "free. Gone on: until the denoiser would have been done, which a server without cancel works for nobody.",
        "",
        *report.table(heads, rows),
    ]


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
