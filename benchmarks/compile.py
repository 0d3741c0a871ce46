"""What compiling a denoiser gains and costs: `python -m benchmarks.compile`; the table goes to docs/benchmarks.

    python -m benchmarks.compile [--model FOLDER] [--device D] [--modes whole] [--sizes 64 128] [--batches 1 8]

Each forward is one that a request of that size has made, with one or more samples. It runs as it is and compiled by
turns, so that a noisy machine hits both alike; figures are medians of the ratio within a round. One CPU thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

from benchmarks import report
from deployments.accelerations.compiled_forwards import compilation_timed, num_samples_of, switched_on
from deployments.devices import select_device, synchronize
from deployments.engine.batching.merging import Merger
from deployments.engine.executor import LocalExecutor
from deployments.messages import STAGES, GenerationRequest, OutputFormat
from deployments.model import CompileMode, DenoisingArgs, ModelArgs
from deployments.stage_pipeline.sessions.denoise import call_directly
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.tensors.values import tensors
from env_config.library_caches import set_library_caches
from env_config.variables import EnvConfig

MODES: tuple[CompileMode, ...] = ("regional", "whole")
WARM_CALLS = 2
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/emoji-flux"))
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels of a side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="samples of a forward")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3, help="forwards of each kind in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_library_caches(EnvConfig.from_environ().runtime.cache_root)
    rows = [row for mode in options.modes for row in Bench(options, mode).rows()]
    write({"machine": report.machine(), "model": options.model.name, "device": options.device,
           "rounds": options.rounds, "calls": options.calls, "rows": rows})  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A forward of a denoiser, as the engine makes it."""

    module: Any
    component: str
    context: Any
    arguments: dict[str, Any]


class Bench:
    """A pipeline whose denoisers can be switched between their two forms."""

    def __init__(self, options: argparse.Namespace, mode: CompileMode) -> None:
        self.options, self.mode, self.device = options, mode, select_device(options.device)
        model = ModelArgs(path=str(options.model), name=options.model.name, dtype=options.dtype, compile=mode)
        self.stage = build_stage(model, STAGES, EnvConfig(), self.device)
        self.denoiser = DenoiserStage(
            self.stage,
            DenoisingArgs(),
            encode=lambda request: encode(self.stage, request),
        )

    @torch.no_grad()
    def rows(self) -> list[Row]:
        try:
            return [self.row(size, batch) for size in self.options.sizes for batch in self.options.batches]
        finally:
            self.denoiser.engine.close()
            torch.compiler.reset()

    def row(self, size: int, batch: int) -> Row:
        call = self.merged(self.recorded(size), batch)
        with compilation_timed() as compiled_s:
            compiled = self.run(call, is_compiled=True)
        plain = self.run(call, is_compiled=False)
        for is_compiled in (False, True) * WARM_CALLS:
            self.run(call, is_compiled)
        rounds = [
            [self.seconds(call, is_compiled) for is_compiled in (False, True)] for _ in range(self.options.rounds)
        ]
        gains = sorted(plain_s / fast_s for plain_s, fast_s in rounds)
        print(f"{self.mode}, {size}x{size}, {batch} samples: {statistics.median(gains):.2f} times as fast", flush=True)
        return {
            "mode": self.mode,
            "size": size,
            "batch": batch,
            "compile_s": compiled_s[0],
            "plain_ms": 1000 * statistics.median(plain_s for plain_s, _ in rounds),
            "gains": gains,
            "deviation": max(map(deviation, tensors(compiled), tensors(plain))),
        }

    def recorded(self, size: int) -> Call:
        """The first forward of a request of that size."""
        calls: list[Call] = []

        def call(module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
            calls.append(Call(module, component, context, dict(kwargs)))
            return call_directly(module, component, context, args, kwargs)

        arguments = {"prompt": "a red apple", "height": size, "width": size, "num_inference_steps": 2}
        request = GenerationRequest("r", "m", arguments, 0, OutputFormat("image", "png"), deterministic=True)
        executor = self.denoiser.engine.batches.executor
        conditioning = encode(self.stage, request)
        self.denoiser.denoise(request, conditioning)  # the batch axes are known then
        self.denoiser.engine.batches.executor = LocalExecutor(call)
        self.denoiser.denoise(request, conditioning)
        self.denoiser.engine.batches.executor = executor
        return calls[0]

    def merged(self, call: Call, batch: int) -> Call:
        merger = Merger(self.denoiser.engine.batches.axes[call.component])
        counts = [merger.num_samples(call.arguments)] * batch
        arguments = merger.merge([call.arguments] * batch, counts)
        return Call(call.module, call.component, call.context, arguments)

    def run(self, call: Call, is_compiled: bool) -> Any:
        axes = self.denoiser.engine.batches.axes[call.component].arguments
        switch, samples = self.stage.switches[call.component], num_samples_of(call.arguments, axes)
        with switched_on(switch, samples, axes) if is_compiled else nullcontext():
            output = call_directly(call.module, call.component, call.context, (), call.arguments)
        synchronize(self.device)
        return output

    def seconds(self, call: Call, is_compiled: bool) -> float:
        started = time.perf_counter()
        for _ in range(self.options.calls):
            self.run(call, is_compiled)
        return (time.perf_counter() - started) / self.options.calls


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, divided by the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)).item()


def write(result: dict[str, Any], write_page: Callable[..., None] = report.write) -> None:
    rows = [
        [
            row["mode"],
            f"{row['size']}x{row['size']}",
            str(row["batch"]),
            f"{row['plain_ms']:.1f} ms",
            f"{statistics.median(row['gains']):.2f} ({row['gains'][0]:.2f} to {row['gains'][-1]:.2f})",
            f"{row['compile_s']:.0f} s" if row["compile_s"] >= 1 else "",
            f"{row['deviation']:.0e}",
        ]
        for row in result["rows"]
    ]
    heads = ["compile", "size", "samples", "as it is", "times as fast (range)", "compiling, once", "deviation"]
    lines = [
        "# Compiled forwards",
        "",
        f"`python -m benchmarks.compile`: one forward of {result['model']}'s denoiser on {result['device']}, one CPU "
        f"thread, load average {result['machine']['load_average'][0]:.1f}. As it is and compiled by turns, "
        f"{result['calls']} forwards each, median of {result['rounds']} rounds. Compiling: what a row "
        "needs beyond those above it, from a warm cache or not. Deviation: relative to the largest value.",
        "",
        *report.table(heads, rows),
    ]
    write_page("compile", result, lines)


if __name__ == "__main__":
    main()
