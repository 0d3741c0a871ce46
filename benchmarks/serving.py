"""Load on a server with OpenAI's API: latency, goodput, failures, and where a request's time goes.

    python -m benchmarks.serving --base-url http://127.0.0.1:8000 --rate 0.5 1 [--mix FILE] [--duration S]

Requests come as a Poisson process whatever became of those before, and latency counts from the time at which
one was to be sent (benchmarks/open_loop.py). A mix is a JSON file as benchmarks/mixes/pictures.json. The API
key, if one is needed, is read from OPENAI_API_KEY. Writes docs/benchmarks/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.open_loop import Timed, open_loop, percentile, poisson_times
from benchmarks.openai_requests import Answer, MixEntry, OpenAIServer, read_mix
from benchmarks.report import DOCS, machine, table, write

MIX = Path(__file__).parent / "mixes" / "pictures.json"
SHARES = {"p50_s": 0.5, "p90_s": 0.9, "p95_s": 0.95, "p99_s": 0.99}


@dataclass(frozen=True)
class Load:
    """One rate of requests a second, and what came of it."""

    rate: float
    entries: list[MixEntry]
    timed: list[Timed[Answer]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="with or without /v1")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.5], help="requests a second; one load each")
    parser.add_argument("--duration", type=float, default=60, help="seconds in which the requests of a load come")
    parser.add_argument("--mix", type=Path, default=MIX)
    parser.add_argument("--model", help="default: the first in /v1/models")
    parser.add_argument("--slo-scale", type=float, default=5.0, help="SLO of entries without slo_s: times the warm-up")
    parser.add_argument("--jobs-every", type=int, default=4, help="every so many pictures as a job, for its progress")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a request has failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for serving.md")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    write("serving", result, as_markdown(result), options.output)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    base_url = options.base_url.rstrip("/").removesuffix("/v1")
    async with OpenAIServer(base_url, options.model, options.timeout, os.environ.get("OPENAI_API_KEY")) as server:
        await server.find_model()
        entries = read_mix(options.mix)
        entries = [await with_slo(server, entry, options.slo_scale) for entry in entries]
        pictures = [entry for entry in entries if entry.media == "image"]
        no_progress = await server.why_no_events(pictures[0]) if pictures else None
        jobs_every = options.jobs_every if pictures and no_progress is None else 0
        loads = []
        for rate in options.rate:
            load = await run_load(server, entries, rate, options.duration, options.seed, jobs_every)
            loads.append(describe(load))
            print({key: value for key, value in loads[-1]["all"].items() if key != "timings"}, flush=True)
    return {
        "machine": machine(),
        "model": server.model,
        "mix": [asdict(entry) for entry in entries],
        "jobs_every": jobs_every,
        "no_progress_of_pictures": no_progress,
        "loads": loads,
    }


async def with_slo(server: OpenAIServer, entry: MixEntry, scale: float) -> MixEntry:
    """Warms the server up; an entry without an SLO gets `scale` times the faster of two lone requests."""
    alone_s = []
    for number in range(2):
        started = time.perf_counter()
        answer = await server.send(entry, -1 - number, False)
        if answer.failure is not None:
            raise RuntimeError(f"{entry.name}: the warm-up failed: {answer.failure}: {answer.text}")
        alone_s.append(time.perf_counter() - started)
    return entry if entry.slo_s is not None else replace(entry, slo_s=scale * min(alone_s))


async def run_load(
    server: OpenAIServer, entries: Sequence[MixEntry], rate: float, duration_s: float, seed: int, jobs_every: int
) -> Load:
    times = poisson_times(rate, duration_s, seed)
    chosen = random.Random(seed).choices(entries, [entry.weight for entry in entries], k=len(times))

    async def send(number: int, _: float) -> Answer:
        as_job = jobs_every > 0 and number % jobs_every == 0
        return await server.send(chosen[number], number, as_job)

    timed = [replace(each, ended_s=each.ended_s - each.answer.asked_more_s) for each in await open_loop(times, send)]
    return Load(rate, chosen, timed)


def describe(load: Load) -> dict[str, Any]:
    """Figures of all requests, and of each entry of the mix."""
    pairs = list(zip(load.entries, load.timed, strict=True))
    names = dict.fromkeys(entry.name for entry in load.entries)
    return {
        "rate": load.rate,
        "largest_lag_of_the_client_s": max((timed.lag_s for timed in load.timed), default=0.0),
        "all": summary(pairs),
        "entries": {name: summary([pair for pair in pairs if pair[0].name == name]) for name in names},
    }


def summary(pairs: list[tuple[MixEntry, Timed[Answer]]]) -> dict[str, Any]:
    """A failed request has no latency, and misses its SLO."""
    made = [(entry, timed) for entry, timed in pairs if timed.answer.failure is None]
    latencies_s = [timed.latency_s for _, timed in made]
    progress_s = [timed.answer.progress_s for _, timed in pairs if timed.answer.progress_s is not None]
    good = sum(entry.slo_s is not None and timed.latency_s <= entry.slo_s for entry, timed in made)
    first, last = (min(t.intended_s for _, t in pairs), max(t.ended_s for _, t in pairs)) if pairs else (0.0, 0.0)
    return {
        "requests": len(pairs),
        "made": len(made),
        "failures": dict(Counter(timed.answer.failure for _, timed in pairs if timed.answer.failure is not None)),
        "throughput": len(made) / (last - first) if pairs else 0.0,
        "goodput": good / (last - first) if pairs else 0.0,
        "slo_attainment": good / len(pairs) if pairs else None,
        "latency": quantiles(latencies_s),
        "first_progress": quantiles(progress_s),
        "timings": timings_of([timed.answer for _, timed in made]),
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean_s": statistics.fmean(values)} | {name: percentile(values, share) for name, share in SHARES.items()}


def timings_of(answers: list[Answer]) -> dict[str, Any]:
    """By the names in the answers' `timings`."""
    by_name: dict[str, list[float]] = {}
    for answer in answers:
        for timings in answer.timings:
            for name, seconds in timings.items():
                by_name.setdefault(name, []).append(seconds)
    return {name: quantiles(values) for name, values in by_name.items()}


def as_markdown(result: dict[str, Any]) -> list[str]:
    slos = ", ".join(f"{entry['name']} {entry['slo_s']:.2f} s" for entry in result["mix"])
    load_average = result["machine"]["load_average"][0]
    lines = [
        f"# Serving {result['model'] or 'one model'} under load",
        "",
        "`python -m benchmarks.serving`: Poisson arrivals, latency from the time at which a request was to be sent. "
        f"SLOs: {slos}. The client ran on a machine with {result['machine']['cores']} cores, load average "
        f"{load_average:.1f} at the end.",
        "",
    ]
    if result["no_progress_of_pictures"]:
        lines += [f"Time to the first progress of pictures was not measured: {result['no_progress_of_pictures']}.", ""]
    elif result["jobs_every"]:
        lines += [f"Each {result['jobs_every']}th picture was asked for as a job, whose events were followed.", ""]
    heads = ("rate", "requests", "made/s", "in SLO", "mean", "p50", "p95", "p99", "first progress p50, p95", "failures")
    rows = []
    for load in result["loads"]:
        parts = [(f"{load['rate']:g}/s, all", load["all"]), *load["entries"].items()]
        rows += [cells(name, part) for name, part in parts]
    lines += table(heads, rows)
    names = list(dict.fromkeys(name for load in result["loads"] for name in load["all"]["timings"]))
    if names:
        parts = [[f"{load['rate']:g}/s", *(timing_cell(load["all"]["timings"].get(n)) for n in names)]
                 for load in result["loads"]]  # fmt: skip
        lines += ["", "Seconds inside the server, by the answers' `timings`: p50, p95", ""]
        lines += table(["rate", *names], parts)
    else:
        lines += ["", "The answers have no `timings`, so nothing is known of the stages."]
    lags = ", ".join(f"{load['largest_lag_of_the_client_s'] * 1e3:.0f} ms" for load in result["loads"])
    return [*lines, "", f"The client itself sent no request later than {lags} after its time."]


def cells(name: str, part: dict[str, Any]) -> tuple[str, ...]:
    latency, progress = part["latency"], part["first_progress"]
    times = [f"{latency[key]:.2f} s" if latency else "" for key in ("mean_s", "p50_s", "p95_s", "p99_s")]
    failures = ", ".join(f"{count} {kind}" for kind, count in part["failures"].items()) or "none"
    return (name, str(part["requests"]), f"{part['throughput']:.2f}", f"{part['slo_attainment']:.0%}", *times,
            f"{progress['p50_s']:.2f} s, {progress['p95_s']:.2f} s" if progress else "", failures)  # fmt: skip


def timing_cell(found: dict[str, float] | None) -> str:
    return f"{found['p50_s']:.3f}, {found['p95_s']:.3f}" if found else ""


if __name__ == "__main__":
    main()
