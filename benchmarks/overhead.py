"""What serving adds to a picture: the served path against the same pipeline called in this process.

    python -m benchmarks.overhead [--config FILE] [--steps N ...] [--rounds N]

Both sides use one thread and take turns, so that a noisy machine hits both alike. Figures are medians; the
parts come from the answer's own timings. What is added for each step is the slope over the numbers of steps; it is told
apart into forwards (the same arithmetic, slower beside Ray's processes) and what happens between them. Writes
docs/benchmarks/overhead.md.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import httpx
import psutil
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import report

START_TIMEOUT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("ray_configs/serve_emoji_cpu.yaml"))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(options.config.read_text())
    arguments = config["applications"][0]["args"]
    defaults = dict(arguments.get("default_arguments", {}))
    pipeline = DiffusionPipeline.from_pretrained(arguments["model"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    with Application(options.config, url) as application:
        rows = [measure(pipeline, url, {**defaults, "num_inference_steps": n}, options.rounds) for n in options.steps]
        memory = application.memory()
    write({"machine": report.machine(), "config": options.config.name, "rows": rows, "memory": memory,
           "ingress_import_s": ingress_import_s(), "empty_chain_ms": empty_chain_ms()})  # fmt: skip


class Application:
    """`serve run` as a user runs it, in a process of its own."""

    def __init__(self, config: Path, url: str) -> None:
        self.config, self.url = config, url

    def __enter__(self) -> Application:
        command = [sys.executable, "-m", "serve_app.tools.launch", str(self.config)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(f"{self.url}/health", self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def memory(self) -> dict[str, Any]:
        """Bytes of weights by stage, and the resident memory of each replica and whether it holds torch."""
        stages = httpx.get(f"{self.url}/health").json()["stages"]
        weights = {name: sum(stage["weight_bytes"].values()) for name, stage in stages.items()}
        processes = {}
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith("ray::ServeReplica:"):
                name = title.split(":")[-1].split(".")[0].split("#")[0].split()[0]
                has_torch = any("libtorch" in m.path for m in process.memory_maps())
                processes[name] = {"pss_mb": round(process.memory_full_info().pss / 1e6), "torch": has_torch}
        return {"weight_bytes": weights, "processes": processes}


def empty_chain_ms(requests: int = 60) -> float:
    """Milliseconds of a request through Ray Serve with nothing to do: what no application on it can go below."""
    port = 8899
    command = [sys.executable, "-m", "benchmarks.empty_chain", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/docs", process)
        seconds = []
        with httpx.Client(timeout=60) as client:
            for _ in range(requests + 10):
                started = time.perf_counter()
                client.post(f"http://127.0.0.1:{port}/").raise_for_status()
                seconds.append(time.perf_counter() - started)
        return 1e3 * statistics.median(seconds[10:])
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            raise RuntimeError("it did not start (the application: see outputs/serve.log)")
        time.sleep(1)
    raise RuntimeError("it did not become ready")


def ingress_import_s() -> float:
    """Seconds until a fresh process has imported all that an ingress replica needs; it must not load torch."""
    code = "import sys, serve_app.ingress; assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(pipeline: Any, url: str, arguments: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of a picture both ways, by turns; the pictures must be the same."""
    body = {
        "prompt": "a big fox on an orange background",
        "size": f"{arguments['width']}x{arguments['height']}",
        "num_inference_steps": arguments["num_inference_steps"],
    }
    alone, served, parts, between, forwards = [], [], [], [], []
    clock = ForwardClock(pipeline.transformer)
    with httpx.Client(timeout=300) as client:
        for seed in range(rounds + 2):
            started = time.perf_counter()
            picture = call(pipeline, body["prompt"], arguments, seed)
            middle = time.perf_counter()
            taken = clock.read()
            answer = client.post(f"{url}/v1/images/generations", json={**body, "seed": seed, "deterministic": True})
            ended = time.perf_counter()
            made = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
            if made.tobytes() != picture.tobytes():
                raise RuntimeError("the served picture is not the pipeline's")
            if seed >= 2:  # the first two warm up both sides
                alone.append(middle - started)
                served.append(ended - middle)
                parts.append(answer.json()["timings"][0])
                forwards.append(taken.forwards_s)
                between.append(taken.between_s)
    seconds = {name: statistics.median(p[name] for p in parts) for name in parts[0]}
    clock.remove()
    return {
        "steps": arguments["num_inference_steps"],
        "alone_s": statistics.median(alone),
        "served_s": statistics.median(served),
        "added_ms": 1e3 * statistics.median(b - a for a, b in zip(alone, served, strict=True)),
        "ratio": statistics.median(b / a for a, b in zip(alone, served, strict=True)),
        "quartiles_of_ratio": statistics.quantiles([b / a for a, b in zip(alone, served, strict=True)], n=4),
        "forwards_added_ms": 1e3 * (seconds["denoiser_forwards"] - statistics.median(forwards)),
        "between_alone_ms": 1e3 * statistics.median(between),
        "between_served_ms": 1e3 * (seconds["denoise"] - seconds["denoiser_forwards"]),
        "parts_ms": {name: 1e3 * value for name, value in seconds.items()},
    }


@dataclass(frozen=True)
class Taken:
    """Seconds in a call's forwards, and from the first one's begin to the last one's end outside of them."""

    forwards_s: float
    between_s: float


class ForwardClock:
    """When each forward of a module began and ended."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._began: list[float] = []
        self._ended: list[float] = []
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._began.append(time.perf_counter())),
            module.register_forward_hook(lambda *_: self._ended.append(time.perf_counter())),
        ]

    def read(self) -> Taken:
        """Of the forwards since the last reading."""
        forwards_s = sum(self._ended) - sum(self._began)
        taken = Taken(forwards_s, self._ended[-1] - self._began[0] - forwards_s)
        self._began.clear()
        self._ended.clear()
        return taken

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def per_step(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds that a step adds (the slope from the fewest to the most steps), its parts, and what comes once."""
    first, last = min(rows, key=lambda row: row["steps"]), max(rows, key=lambda row: row["steps"])

    def slope(of: Callable[[Mapping[str, Any]], float]) -> float:
        return (of(last) - of(first)) / (last["steps"] - first["steps"])

    added = slope(lambda row: row["added_ms"])
    return {
        "once_ms": first["added_ms"] - added * first["steps"],
        "step_ms": added,
        "forward_ms": slope(lambda row: row["forwards_added_ms"]),
        "between_ms": slope(lambda row: row["between_served_ms"] - row["between_alone_ms"]),
    }


def call(pipeline: Any, prompt: str, arguments: dict[str, Any], seed: int) -> Image.Image:
    """The unsplit pipeline, as the served one is called."""
    torch.manual_seed(seed)
    with torch.no_grad():
        output = pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments)
    picture: Image.Image = output.images[0]
    return picture


def write(result: dict[str, Any]) -> None:
    lines = [
        f"# Serving overhead ({result['config']}, one thread, load average {result['machine']['load_average'][0]:.1f})",
        "",
        "| steps | in process | served | added | ratio | parts of the served time (ms) |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in row["parts_ms"].items())
        lines.append(
            f"| {row['steps']} | {row['alone_s'] * 1e3:.0f} ms | {row['served_s'] * 1e3:.0f} ms "
            f"| {row['added_ms']:.0f} ms | {row['ratio']:.3f} | {parts} |"
        )
    if len(result["rows"]) > 1:
        each = per_step(result["rows"])
        lines += [
            "",
            f"Added once: {each['once_ms']:.0f} ms. Added for each step: {each['step_ms']:.2f} ms, of which "
            f"{each['forward_ms']:.2f} ms in the forward (the same arithmetic beside Ray's processes) and "
            f"{each['between_ms']:.2f} ms between two forwards (the engine, the checkpoint, the events).",
        ]
    lines += ["", "| deployment | bytes of weights | resident (PSS) | torch loaded |", "|---|---|---|---|"]
    for name, process in sorted(result["memory"]["processes"].items()):
        weights = result["memory"]["weight_bytes"].get(name, 0)
        lines.append(f"| {name} | {weights:,} | {process['pss_mb']} MB | {'yes' if process['torch'] else 'no'} |")
    lines += [
        "",
        f"A request through Ray Serve's proxy, an ingress and a chain of three deployments that do nothing: "
        f"{result['empty_chain_ms']:.0f} ms (benchmarks/empty_chain.py). No application on Serve goes below it here.",
        f"A fresh process imports the ingress in {result['ingress_import_s']:.1f} s, without torch.",
    ]
    report.write("overhead", result, lines)


if __name__ == "__main__":
    main()
