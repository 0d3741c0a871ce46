"""Three models on one pool of accelerators whose load shifts from one to another: policies against the best possible.

    python -m benchmarks.models_on_one_pool [--accelerators N ...] [--seeds N]

Needs scipy; simulated (benchmarks/cluster_simulation.py). Writes docs/benchmarks/models_on_one_pool.md.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cluster_simulation import Arrival, Outcome, Policy, RequestKind, Stage, simulate
from benchmarks.goodput_bound import Bound, bound
from benchmarks.load_profile import work_of_mix
from benchmarks.open_loop import percentile
from benchmarks.report import machine, table, write
from benchmarks.scaling_policies import Fixed, ReplicaRatio, ServeDefault
from serve_app.autoscaling.pool import Demand, fill

DURATION_S = 3600.0
STEP_S = 0.5  # the load is constant for so long
SLO_SCALE = 5.0  # latencies of a lone request
SLOTS_A_SLO = 3  # of the linear program
BATCHED = {"max_ongoing_requests": 4, "batch": 4, "marginal_cost": 0.9}

# One H100 each, but for Qwen-Image on two: SGLang 0.5.23's own CI baselines (perf_baselines/h100.json), as in
# stage_costs.json; start_s and marginal_cost are assumed as there. FLUX.1 and Qwen-Image are served in one stage.
STAGES = (
    Stage("denoiser-flux", start_s=60, **BATCHED),
    Stage("denoiser-qwen", start_s=60, accelerators=2, **BATCHED),
    Stage("encoder-wan", start_s=60),
    Stage("denoiser-wan", start_s=60, **BATCHED),
    Stage("vae-wan", start_s=60),
)
KINDS = (
    RequestKind("flux", (6.478,), extra_s=0.215, first_stage=0),
    RequestKind("qwen", (10.120,), extra_s=0.072, first_stage=1),
    RequestKind("wan", (0.328, 12.705, 2.172), extra_s=0.395, first_stage=2),
)


@dataclass(frozen=True)
class Load:
    """`shares` of all accelerators' work that each model's requests bring, by the time in seconds; 1 in sum."""

    says: str
    shares: Callable[[float], Sequence[float]]


def shifting(time_s: float) -> Sequence[float]:
    """From a thirtieth to two thirds and back in an hour, one model after the other."""
    return [(1 + 0.9 * math.cos(2 * math.pi * (time_s / 3600 - number / 3))) / 3 for number in range(3)]


def in_turns(time_s: float) -> Sequence[float]:
    most = int(time_s / 1200) % 3
    return [0.7 if number == most else 0.15 for number in range(3)]


def alternating(time_s: float) -> Sequence[float]:
    first = int(time_s / 60) % 2 == 0
    return [0.65 if first else 0.05, 0.05 if first else 0.65, 0.3]


LOADS = {
    "shifting": Load("each model between 3 % and 63 % of the load, one after the other, in an hour", shifting),
    "in turns": Load("every 20 minutes another model has 70 % of the load, from one moment to the next", in_turns),
    "alternating": Load(
        "every minute, the time that a replica takes to start, 60 % of the load change sides", alternating
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerators", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--peak", type=float, default=0.8, help="the load, as a share of what the accelerators can do")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of arrivals; figures are their medians")
    parser.add_argument("--processes", type=int, default=1, help="that simulate at a time")
    options = parser.parse_args()
    runs = [
        (accelerators, name, options.peak, seed)
        for accelerators in options.accelerators
        for name in LOADS
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.processes) as processes:
        rows = [row for each in processes.map(compare, *zip(*runs, strict=True)) for row in each]
    result = {"machine": machine(), "peak": options.peak, "seeds": options.seeds, "rows": medians(rows)}
    write("models_on_one_pool", result, as_markdown(result))


def compare(accelerators: int, load: str, peak: float, seed: int) -> list[dict[str, Any]]:
    """Each policy under the same arrivals."""
    arrivals = arrivals_of(LOADS[load], accelerators, peak, seed)
    kinds = with_slo(KINDS)
    best = bound(STAGES, arrivals, accelerators, min(kind.slo_s for kind in kinds) / SLOTS_A_SLO)
    rows = []
    for name, (policy, initial) in policies(LOADS[load], accelerators, peak).items():
        outcome = simulate(STAGES, arrivals, accelerators, policy, initial, refuse_late=True)
        row = {
            "accelerators": accelerators,
            "load": load,
            "policy": name,
            "seed": seed,
            **told(outcome, arrivals, best),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def with_slo(kinds: Sequence[RequestKind]) -> list[RequestKind]:
    return [replace(kind, slo_s=SLO_SCALE * kind.alone_s) for kind in kinds]


def arrivals_of(load: Load, accelerators: int, peak: float, seed: int) -> list[Arrival]:
    """Poisson arrivals that bring `peak` of the work that all accelerators could do."""
    chance, arrivals = random.Random(seed), []
    for number, kind in enumerate(with_slo(KINDS)):
        time_s = 0.0
        while time_s < DURATION_S:
            rate = peak * accelerators * load.shares(time_s)[number] / sum(work_of_mix(STAGES, [kind], [1.0]))
            moment_s = time_s + chance.expovariate(rate)
            while moment_s < time_s + STEP_S:
                arrivals.append(Arrival(moment_s, kind))
                moment_s += chance.expovariate(rate)
            time_s += STEP_S
    return sorted(arrivals, key=lambda arrival: arrival.time_s)


def policies(load: Load, accelerators: int, peak: float) -> dict[str, tuple[Policy, list[int]]]:
    """Each with the replicas that it starts with."""
    times = [10.0 * step for step in range(int(DURATION_S / 10))]
    mean = [statistics.fmean(load.shares(time_s)[number] for time_s in times) for number in range(len(KINDS))]
    start = fixed_shares(load.shares(0.0), accelerators)
    by_mean, thirds = fixed_shares(mean, accelerators), fixed_shares([1 / 3] * 3, accelerators)
    return {
        "one policy for all models": (ReplicaRatio(accelerators, STAGES), start),
        "Serve's default": (ServeDefault(len(STAGES), accelerators), start),
        "fixed, by the mean work": (Fixed(by_mean), by_mean),
        "fixed, a third each": (Fixed(thirds), thirds),
    }


def fixed_shares(shares: Sequence[float], accelerators: int) -> list[int]:
    """Replicas by the work of each stage when the models have these shares of it; all accelerators are given out."""
    work = [0.0] * len(STAGES)
    for share, kind in zip(shares, KINDS, strict=True):
        of_kind = work_of_mix(STAGES, [kind], [1.0])
        work = [done + share * more / sum(of_kind) for done, more in zip(work, of_kind, strict=True)]
    demands = [
        Demand(
            stage.name, now=1, fair=each / stage.accelerators, held=0, least=1, have=0, accelerators=stage.accelerators
        )
        for stage, each in zip(STAGES, work, strict=True)
    ]
    return fill(accelerators, demands, [1] * len(STAGES), [accelerators] * len(STAGES))


def told(outcome: Outcome, arrivals: Sequence[Arrival], best: Bound) -> dict[str, Any]:
    latencies_s = [latency_s for _, latency_s in outcome.latencies_s]
    good_of_kind = {
        kind.name: sum(latency_s <= kind.slo_s for each, latency_s in outcome.latencies_s if each.name == kind.name)
        / max(1, sum(arrival.kind.name == kind.name for arrival in arrivals))
        for kind in KINDS
    }
    return {
        "good": outcome.num_good,
        "goodput_of_best": outcome.num_good / best.num_good,
        "refused": outcome.num_refused / outcome.num_arrived,
        "worst_model": min(good_of_kind.values()),
        "p95_s": percentile(latencies_s, 0.95),
        "starts": outcome.num_starts,
        "loading_share": outcome.num_starts * STAGES[0].start_s / max(1.0, outcome.accelerator_s),
        "accelerator_hours": outcome.accelerator_s / 3600,
    }


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (accelerators, load, policy): its medians over the seeds, and the goodput's range."""
    of_key: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        of_key.setdefault((row["accelerators"], row["load"], row["policy"]), []).append(row)
    middle = []
    for same in of_key.values():
        values = {k: v if isinstance(v, str) else statistics.median(row[k] for row in same) for k, v in same[0].items()}
        goodput = [row["goodput_of_best"] for row in same]
        middle.append(values | {"seeds": len(same), "goodput_range": [min(goodput), max(goodput)]})
    return middle


def as_markdown(result: dict[str, Any]) -> list[str]:
    heads = ("accelerators", "load", "policy", "goodput, of the best possible", "good of the worst served model",
             "refused", "p95", "starts")  # fmt: skip
    return [
        "# Three models on one pool, simulated",
        "",
        "`python -m benchmarks.models_on_one_pool`: FLUX.1-dev (one H100), Qwen-Image (replicas of two H100s) and "
        "Wan2.2 TI2V 5B (three stages of one H100 each), with the stage costs that SGLang 0.5.23 publishes of its own "
        "runs; a replica takes 60 s to start (assumed). Poisson arrivals for an hour bring "
        f"{result['peak']:.0%} of what all accelerators can do. Goodput counts the requests that end within five "
        "times the latency of a lone one; what is predicted to end later is refused, whatever the policy. The best "
        "possible is a bound that knows all arrivals beforehand and needs no whole replicas "
        "(`benchmarks/goodput_bound.py`). The one policy for all models is the application's own "
        "(`serve_app/autoscaling/`), called as Serve calls it. Fixed shares by the mean work know the mean of the hour "
        "beforehand. Medians over "
        f"{result['seeds']} seeds of arrivals, the range of the goodput in brackets.",
        "",
        *(f"- {name}: {load.says}" for name, load in LOADS.items()),
        "",
        *table(heads, [cells(row) for row in result["rows"]]),
    ]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    least, most = row["goodput_range"]
    return (
        str(row["accelerators"]), row["load"], row["policy"],
        f"{row['goodput_of_best']:.1%} ({least:.1%} to {most:.1%})", f"{row['worst_model']:.1%}",
        f"{row['refused']:.1%}", f"{row['p95_s']:.0f} s", f"{row['starts']:.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
