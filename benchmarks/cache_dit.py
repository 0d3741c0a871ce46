"""What Cache-DiT saves and costs: each setting against the same request uncached, in one run.

    python -m benchmarks.cache_dit [--model FOLDER] [--device D] [--steps N] [--prompts N] [--rounds N] [--judged N]

On an accelerator, with a checkpoint of real size (benchmarks/real_size.py):

    python -m benchmarks.cache_dit --model FOLDER --device cuda --size 1024 --judged 0

Uncached and cached requests take turns on one thread and one step engine, so that a noisy machine hits them
alike. Times are the denoiser's, as medians of the ratio within a round. Writes docs/benchmarks/cache_dit.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

from benchmarks import report
from checkpoints.train.evaluate import held_out_prompts
from checkpoints.train.judge import judge
from deployments.devices import select_device
from deployments.features.cache_dit.plan import has_preset
from deployments.messages import STAGES, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, ModelArgs
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig

JUDGED_STEPS = 20
PROMPTS = ("a red apple", "a smiling face with sunglasses", "a green tree", "a yellow star", "a blue fish")
PRESETS = ("slow", "medium", "fast", "ultra")
# The names are those of a request's `cache_dit` field; what is not named has the document's default.
SETTINGS: dict[str, dict[str, Any]] = {
    "documented defaults": {},
    "residual_diff_threshold 0.12": {"residual_diff_threshold": 0.12},
    "residual_diff_threshold 0.5": {"residual_diff_threshold": 0.5},
    "TaylorSeer, order 1": {"enable_taylorseer": True},
    "TaylorSeer, order 2": {"enable_taylorseer": True, "taylorseer_order": 2},
    **{f"preset {name}, dynamic": {"scm_preset": name} for name in PRESETS},
    **{f"preset {name}, static": {"scm_preset": name, "scm_policy": "static"} for name in PRESETS},
    **{
        f"preset {name}, static, TaylorSeer": {"scm_preset": name, "scm_policy": "static", "enable_taylorseer": True}
        for name in PRESETS
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/emoji-flux"))
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--judged", type=int, default=100, help="held-out prompts of emoji-flux, judged; 0: none")
    options = parser.parse_args()
    assert has_preset(options.steps), "cache-dit's presets have no table for this number of steps"
    torch.set_num_threads(1)
    bench = Bench(options.model, options.steps, options.size, options.device)
    runs = [bench.compare(prompt, seed) for seed in range(options.rounds) for prompt in PROMPTS[: options.prompts]]
    rows = [summarize(name, [run[name] for run in runs]) for name in SETTINGS]
    write({"machine": report.machine(), "model": options.model.name, "device": options.device,
           "steps": options.steps, "size": options.size,
           "requests": len(runs), "rows": rows,
           "judged": judged_pictures(options.model, options.judged) if options.judged else None})  # fmt: skip


class Bench:
    """A pipeline in one process, whose denoiser is timed."""

    def __init__(self, model: Path, steps: int, size: int, device: str = "cpu") -> None:
        self.model, self.steps, self.size = model.name, steps, size
        self.device = select_device(device)
        self.stage = build_stage(ModelArgs(path=str(model), name=model.name), STAGES, EnvConfig(), self.device)
        self.denoiser = DenoiserStage(self.stage, DenoisingArgs(max_batch_size=1))
        self.run(PROMPTS[0], 0, {"enable": True})  # the library is loaded, its forward compared with the original

    def compare(self, prompt: str, seed: int) -> dict[str, dict[str, float]]:
        """Each setting against the uncached request that ran just before it."""
        found = {}
        for name, setting in SETTINGS.items():
            truth, uncached_s, _ = self.run(prompt, seed, {"enable": False})
            picture, cached_s, caches = self.run(prompt, seed, {"enable": True, **setting})
            found[name] = {
                "time": cached_s / uncached_s,
                "blocks": caches["blocks_computed"] / caches["blocks_total"],
                "computed_steps": caches["computed_steps"],
                "reused_steps": caches["reused_steps"],
                "error": (picture - truth).abs().mean().item(),
                "psnr": psnr(picture, truth),
            }
        return found

    def run(self, prompt: str, seed: int, cache_dit: dict[str, Any]) -> tuple[torch.Tensor, float, dict[str, Any]]:
        """The picture [B, C, H, W] in 0..1, the seconds of its denoising, and what was computed and reused."""
        arguments = {"prompt": prompt, "height": self.size, "width": self.size, "num_inference_steps": self.steps}
        features = {"cache_dit": cache_dit}
        request = GenerationRequest("r", self.model, arguments, seed, OutputFormat("image", "png"), features=features)
        conditioning = encode(self.stage, request)
        self.denoiser.recent_summaries["cache_dit"].clear()
        started = time.perf_counter()
        inputs, _ = self.denoiser.denoise(request, conditioning)
        seconds = time.perf_counter() - started
        [caches] = [*self.denoiser.recent_summaries["cache_dit"]] or [{}]
        return decode_output(self.stage, request, inputs).images.float().cpu(), seconds, caches.get("transformer", {})


@torch.no_grad()
def judged_pictures(model: Path, count: int) -> dict[str, Any]:
    """Held-out prompts of the embedded model at its default steps, with the documented defaults and without a cache."""
    bench = Bench(model, JUDGED_STEPS, 128)
    right, ratios = {"cached": 0, "uncached": 0}, []
    for seed, (scene, prompt) in enumerate(held_out_prompts(count)):
        seconds = {}
        for name in right:
            picture, seconds[name], _ = bench.run(prompt, seed, {"enable": name == "cached"})
            pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            right[name] += judge(pixels) == scene
        ratios.append(seconds["uncached"] / seconds["cached"])
    return {"prompts": count, "steps": JUDGED_STEPS, "right": right, "speed_up": statistics.median(ratios)}


def psnr(picture: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of values in 0..1."""
    mean_square = (picture - truth).square().mean().item()
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def summarize(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {"setting": name, **medians, "worst_psnr": min(run["psnr"] for run in runs)}


def write(result: dict[str, Any]) -> None:
    lines = [
        "# Cache-DiT: what is saved, and what it costs",
        "",
        f"`python -m benchmarks.cache_dit`: {result['model']}, {result['size']}x{result['size']}, {result['steps']} "
        f"steps, {result['requests']} requests for each row, on {result['device']}, one CPU thread, load average "
        f"{result['machine']['load_average'][0]:.1f}. Each cached request is compared with the same request "
        "uncached, run just before it; figures are medians. Error is the mean difference of the decoded picture's "
        "values in 0..1.",
        "",
        "| setting | steps computed | blocks computed | time | error | PSNR (dB) | worst PSNR |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['setting']} | {row['computed_steps']:.0f} of {result['steps']} | {row['blocks']:.0%} | "
            f"{row['time']:.0%} | {row['error']:.4f} | {row['psnr']:.1f} | {row['worst_psnr']:.1f} |"
        )
    if judged := result["judged"]:
        lines += [
            "",
            f"Judged as in checkpoints/README.md (noun, background and size all right), {judged['prompts']} held-out "
            f"prompts at {judged['steps']} steps: {judged['right']['cached']} right with the documented defaults, "
            f"{judged['right']['uncached']} uncached. Denoising is {judged['speed_up']:.2f} times as fast (median).",
        ]
    report.write("cache_dit", result, lines)


if __name__ == "__main__":
    main()
