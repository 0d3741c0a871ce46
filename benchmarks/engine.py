"""What the step engine gains and costs: `python -m benchmarks.engine`; the tables go to docs/benchmarks/engine.md.

With `--checkpoint FOLDER --device cuda` a FLUX checkpoint on an accelerator instead of two small models on the CPU
(one with random weights and the size of FLUX.1-dev: benchmarks/real_size.py).

Every number is a ratio or a time of two things measured in turns in one process, the median over the rounds,
because the machine may have other work. One thread of arithmetic, so that batching and not threading is seen.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging

from benchmarks import report
from deployments.devices import select_device, synchronize
from deployments.engine.fiber import CancelledStage
from deployments.messages import Conditioning, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, ModelArgs
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import DenoiseSession
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.stages.encode import call_arguments, encode, unpack_conditioning
from env_config.variables import EnvConfig
from tests.support.tiny_models.flux import TRANSFORMER, flux

TEXT_TOKENS = 32
BATCH = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A transformer of FLUX's kind."""

    name: str
    hidden: int
    heads: int
    num_layers: int
    num_single_layers: int


SMALL = Size("0.6 M parameters, hidden 64", 64, 4, 2, 4)
LARGE = Size("18 M parameters, hidden 256", 256, 8, 4, 8)
SMALL_TOKENS = (16, 64, 256)  # of the latents: side of the picture / 16, squared
CHECKPOINT_TOKENS = (256, 1024, 4096)


def write_tiny(size: Size, folder: Path) -> None:
    """A checkpoint with a random transformer of that size."""
    torch.manual_seed(0)
    pipeline, _ = flux()
    per_head = size.hidden // size.heads
    config = TRANSFORMER | {
        "num_attention_heads": size.heads,
        "attention_head_dim": per_head,
        "num_layers": size.num_layers,
        "num_single_layers": size.num_single_layers,
        "axes_dims_rope": [per_head // 4, per_head // 4, per_head // 2],
    }
    pipeline.register_modules(transformer=FluxTransformer2DModel(**config).eval())
    pipeline.save_pretrained(folder)


class Model:
    """The transformer and the encoders of a checkpoint, in this process."""

    def __init__(self, name: str, folder: Path, device: str = "cpu") -> None:
        self.name = name
        self.device = select_device(device)
        model = ModelArgs(path=str(folder), name=name)
        self.stage: StagePipeline = build_stage(model, ("denoiser",), EnvConfig(), self.device)
        self.encoder = build_stage(model, ("encoder",), EnvConfig(), self.device)

    def synchronize(self) -> None:
        synchronize(self.device)

    def request(self, tokens: int, steps: int, name: str = "request", **settings: Any) -> GenerationRequest:
        """`tokens` is that of the latents, a square number."""
        side = round(tokens**0.5) * 2 * self.stage.pipeline.vae_scale_factor
        arguments = {"prompt": "a small cat", "height": side, "width": side, "num_inference_steps": steps}
        arguments["max_sequence_length"] = TEXT_TOKENS
        return GenerationRequest(name, "benchmark", arguments, 0, OutputFormat("image", "png"), **settings)

    def conditioning(self, request: GenerationRequest) -> Conditioning:
        return encode(self.encoder, request)

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[DenoiserStage]:
        stage = DenoiserStage(
            self.stage,
            DenoisingArgs(**settings),
            encode=lambda request: encode(self.encoder, request),
            adapters=self.stage.adapters,
        )
        try:
            yield stage
        finally:
            stage.engine.close()

    def run_plain(self, request: GenerationRequest, conditioning: Conditioning) -> None:
        """The pipeline's loop with no engine at all."""
        calls = unpack_conditioning(conditioning, self.stage)
        DenoiseSession(self.stage, call_arguments(self.stage, request), request.seed, calls).run()


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def together(works: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def throughput(model: Model, tokens: int, rounds: int) -> Row:
    """Eight requests through the engine against the same eight one after another without it."""
    request = model.request(tokens, 20)
    conditioning = model.conditioning(request)
    merged, alone, forwards = [], [], []
    with model.engine(max_batch_size=BATCH, merging="always") as stage:

        def through_engine() -> None:
            together([lambda: stage.denoise(request, conditioning)] * BATCH)

        def one_at_a_time() -> None:
            for _ in range(BATCH):
                model.run_plain(request, conditioning)

        through_engine()
        one_at_a_time()
        stage.engine.statistics.batch_sizes.clear()
        for _ in range(rounds):
            merged.append(seconds_of(through_engine))
            alone.append(seconds_of(one_at_a_time))
            forwards.append(gain_of_forward(model, tokens))
        sizes = stage.engine.statistics.batch_sizes
    return {
        "model": model.name,
        "tokens": tokens + TEXT_TOKENS,
        "gain": median_ratio(alone, merged),
        "gain_of_the_forward": statistics.median(forwards),
        "mean_batch": sum(n * count for n, count in sizes.items()) / sum(sizes.values()),
    }


@torch.no_grad()
def gain_of_forward(model: Model, tokens: int) -> float:
    """What a batch of eight gains in the transformer alone: the bound of what an engine can gain."""
    transformer = model.stage.components["transformer"]
    config = transformer.config
    zeros = partial(torch.zeros, device=model.stage.device, dtype=model.stage.dtype)

    def forward(batch: int) -> None:
        transformer(
            hidden_states=zeros(batch, tokens, config.in_channels),
            encoder_hidden_states=zeros(batch, TEXT_TOKENS, config.joint_attention_dim),
            pooled_projections=zeros(batch, config.pooled_projection_dim),
            timestep=zeros(batch) + 1,
            guidance=zeros(batch) + 1,
            img_ids=zeros(tokens, 3),
            txt_ids=zeros(TEXT_TOKENS, 3),
        )
        model.synchronize()

    forward(1), forward(BATCH)
    alone = seconds_of(lambda: [forward(1) for _ in range(2 * BATCH)])
    return alone / seconds_of(lambda: [forward(BATCH) for _ in range(2)])


def lone_cost(model: Model, tokens: int, rounds: int) -> Row:
    """A lone request through the engine against the same loop without it, by what is not the transformer's forward."""
    request = model.request(tokens, 20 if tokens < 500 else 8)
    conditioning = model.conditioning(request)
    checkpointed = DenoisingFollower(checkpoint=lambda checkpoint: None)
    with model.engine() as stage, forwards_timed(model) as in_forwards:
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: model.run_plain(request, conditioning),
            "engine": lambda: stage.denoise(request, conditioning),
            "checkpointed": lambda: stage.denoise(request, conditioning, follower=checkpointed),
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        besides: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                in_forwards.clear()
                wall[name].append(seconds_of(way))
                besides[name].append(wall[name][-1] - sum(in_forwards))
    whole, own = statistics.median(wall["plain"]), {name: statistics.median(besides[name]) for name in ways}
    return {
        "model": model.name,
        "tokens": tokens + TEXT_TOKENS,
        "step_ms": 1000 * whole / request.arguments["num_inference_steps"],
        "besides_forwards_ms": 1000 * own["plain"],
        "besides_forwards_engine_ms": 1000 * own["engine"],
        "cost": (own["engine"] - own["plain"]) / whole,
        "cost_with_checkpoints": (own["checkpointed"] - own["plain"]) / whole,
    }


@contextmanager
def forwards_timed(model: Model) -> Iterator[list[float]]:
    """The seconds of each forward of the transformer."""
    transformer, seconds = model.stage.components["transformer"], list[float]()
    forward = transformer.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            output = forward(*args, **kwargs)
            model.synchronize()
            return output
        finally:
            seconds.append(time.perf_counter() - started)

    transformer.forward = timed
    try:
        yield seconds
    finally:
        del transformer.forward


def cancel_latency(model: Model, cancels: int) -> Row:
    """From the call of `cancel` at a random moment to the end of the request, beside another request."""
    steps, randomness = 40, random.Random(0)
    request = model.request(256, steps)
    conditioning = model.conditioning(request)
    latencies = []
    with model.engine() as stage:
        duration = seconds_of(lambda: stage.denoise(request, conditioning))
        threads_before = threading.active_count()
        for _ in range(cancels):
            latencies.append(cancelled_after(stage, request, conditioning, randomness.uniform(0.05, 0.9) * duration))
        left = threading.active_count() - threads_before
    return {
        "model": model.name,
        "cancels": cancels,
        "step_ms": 1000 * duration / steps,
        "median_ms": 1000 * statistics.median(latencies),
        "largest_ms": 1000 * max(latencies),
        "largest_in_steps": max(latencies) / (duration / steps),
        "threads_left": left,
    }


def cancelled_after(
    stage: DenoiserStage, request: GenerationRequest, conditioning: Conditioning, delay_s: float
) -> float:
    started: list[DenoiseRun] = []
    ended: list[float] = []

    def work() -> None:
        try:
            stage.denoise(request, conditioning, follower=DenoisingFollower(started=started.append))
        except CancelledStage:
            ended.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(delay_s)
    while not started:
        time.sleep(0.001)
    called = time.perf_counter()
    stage.engine.cancel(started[0].fiber)
    thread.join()
    return ended[0] - called if ended else 0.0  # it was done before


def mixed_load(model: Model, rounds: int) -> Row:
    """Short pictures that come while a long video runs: by slack against first come, first served."""
    long, short = model.request(484, 40, "long"), model.request(16, 4, "short")
    conditionings = {id(r): model.conditioning(r) for r in (long, short)}
    mixed: dict[str, dict[str, list[float]]] = {order: {"long": [], "short": []} for order in ("slack", "fifo")}
    long_alone, shorts_alone = [], []
    with model.engine(order="slack") as slack, model.engine(order="fifo") as fifo:
        for stage in (slack, fifo):
            stage.denoise(long, conditionings[id(long)])
            stage.denoise(short, conditionings[id(short)])
        for _ in range(rounds):
            long_alone.append(seconds_of(lambda: slack.denoise(long, conditionings[id(long)])))
            shorts = [seconds_of(lambda: slack.denoise(short, conditionings[id(short)])) for _ in range(SHORT_REQUESTS)]
            shorts_alone.append(sum(shorts))
            for order, stage in (("slack", slack), ("fifo", fifo)):
                one_mixed_run(stage, long, short, conditionings, long_alone[-1], mixed[order])
    p95 = {order: percentile(run["short"], 0.95) for order, run in mixed.items()}
    slowed = [together - alone for together, alone in zip(mixed["slack"]["long"], long_alone, strict=True)]
    return {
        "model": model.name,
        "short_alone_ms": 1000 * statistics.median(shorts_alone) / SHORT_REQUESTS,
        "short_p95_slack_ms": 1000 * p95["slack"],
        "short_p95_fifo_ms": 1000 * p95["fifo"],
        "p95_fifo_to_slack": p95["fifo"] / p95["slack"],
        "long_alone_ms": 1000 * statistics.median(long_alone),
        "long_slowed_by_ms": 1000 * statistics.median(slowed),
        "work_of_the_short_ms": 1000 * statistics.median(shorts_alone),
        "slowed_to_work": median_ratio(slowed, shorts_alone),
    }


SHORT_REQUESTS = 10


def one_mixed_run(
    stage: DenoiserStage,
    long: GenerationRequest,
    short: GenerationRequest,
    conditionings: dict[int, Conditioning],
    lone_long: float,
    into: dict[str, list[float]],
) -> None:
    def timed(request: GenerationRequest, delay_s: float, kind: str) -> None:
        time.sleep(delay_s)
        into[kind].append(seconds_of(lambda: stage.denoise(request, conditionings[id(request)])))

    every = 0.7 * lone_long / SHORT_REQUESTS
    works: list[Callable[[], Any]] = [lambda: timed(long, 0.0, "long")]
    for index in range(SHORT_REQUESTS):
        works.append(lambda index=index: timed(short, (index + 1) * every, "short"))  # type: ignore[misc]
    together(works)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# section -> (what the table shows, what was wanted)
SECTIONS = {
    "throughput": (
        "Eight requests of 20 steps together through the engine, against one after another without it. The gain of "
        "the forward is that of one batch of eight against eight forwards.",
        "at 48 tokens at least 3 with hidden 64 and 2 with hidden 256",
    ),
    "lone_request": (
        "What a lone request pays for going through the engine: the time of the whole loop but for the transformer's "
        "forwards, which both ways run alike and whose time varies more on such a machine than the engine costs; as a "
        "share of the time of the loop without the engine; and with checkpoints at their default interval.",
        "at most 3 % at 48 tokens and 1 % at 1,000",
    ),
    "cancel": ("Cancels at random moments, until the request's slot is free.", "at most one step and 50 ms"),
    "mixed_load": (
        "Ten short pictures that come while a long request runs.",
        "the long one is slowed by less than the work of the short ones",
    ),
}


Note = Callable[[str, Row], None]  # of a section


def measure(rounds: int, note: Note) -> None:
    """All sections for the two small models; `rounds` is the number of turns that each median is taken over."""
    for size, tokens_together in ((SMALL, SMALL_TOKENS), (LARGE, SMALL_TOKENS[:2])):
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(size, Path(folder))
            measure_model(Model(size.name, Path(folder)), tokens_together, (16, 961), rounds, note)


def measure_model(
    model: Model, tokens_together: Sequence[int], tokens_alone: Sequence[int], rounds: int, note: Note
) -> None:
    for tokens in tokens_together:
        note("throughput", throughput(model, tokens, rounds))
    for tokens in tokens_alone:
        note("lone_request", lone_cost(model, tokens, 4 * rounds))
    note("cancel", cancel_latency(model, 50))
    note("mixed_load", mixed_load(model, rounds))


def as_markdown(results: dict[str, list[Row]], rounds: int) -> list[str]:
    how_measured = " ".join((__doc__ or "").strip().rsplit("\n\n", 1)[-1].split())
    lines = [
        "# The step engine",
        "",
        f"Made by `python -m benchmarks.engine --rounds {rounds}`; {how_measured}",
    ]
    for name, rows in results.items():
        title, wanted = SECTIONS[name]
        if rows:
            lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", f"{title} Wanted: {wanted}.", ""]
            columns = list(rows[0])
            heads = [column.replace("_", " ") for column in columns]
            lines += report.table(heads, [[shown(column, row[column]) for column in columns] for row in rows])
    return lines


def shown(column: str, value: Any) -> str:
    if column.startswith("cost"):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that each median is taken over")
    parser.add_argument("--checkpoint", type=Path, help="of FLUX's kind, in place of the two small models")
    parser.add_argument("--device", default="cpu", help="of the checkpoint, such as cuda")
    parser.add_argument("--output", type=Path, default=report.DOCS, help="folder for engine.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    results: dict[str, list[Row]] = {name: [] for name in SECTIONS}

    def note(section: str, row: Row) -> None:
        """Written at once: a run that is ended early leaves what it has measured."""
        results[section].append(row)
        content = {"machine": report.machine(), "rounds": arguments.rounds, **results}
        report.write("engine", content, as_markdown(results, arguments.rounds), arguments.output)

    if arguments.checkpoint is None:
        measure(arguments.rounds, note)
    else:
        model = Model(f"{arguments.checkpoint.name} on {arguments.device}", arguments.checkpoint, arguments.device)
        measure_model(model, CHECKPOINT_TOKENS, CHECKPOINT_TOKENS, arguments.rounds, note)


if __name__ == "__main__":
    main()
