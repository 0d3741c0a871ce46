"""How policies of scaling fare on up to 1,000 accelerators, against the best possible, in a validated simulation.

    python -m benchmarks.scale [--costs FILE] [--accelerators N ...] [--seeds N] [--skip-validation]

Needs scipy. First a real application with two denoisers is measured, loaded, and its latencies compared with
those that the simulation predicts for the very same arrivals. Then clusters are simulated under loads that
swing 30-fold. Writes docs/benchmarks/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from benchmarks.cluster_simulation import REFUSE_FROM, Arrival, Policy, RequestKind, Stage, simulate
from benchmarks.goodput_bound import Bound, bound
from benchmarks.load_profile import PROFILES, Profile, arrivals_of, mean_second_kind, work_by_stage
from benchmarks.open_loop import percentile
from benchmarks.report import RAW, machine, table, write
from benchmarks.scale_validation import validate
from benchmarks.scaling_policies import Fixed, ReplicaRatio, ServeDefault, proportional

COSTS = Path(__file__).parent / "stage_costs.json"
EMBEDDED = "emoji_flux_cpu"
MOST_FOR_EMBEDDED = 100  # accelerators: its requests are so short that more of them would take an hour to simulate
MOST_FOR_SEEDS = 100  # accelerators: with more, the arrivals of one seed are so many that another tells nothing new
SLOTS_A_SLO = 3  # of the linear program: shorter slots make the bound tighter and the program larger


@dataclass(frozen=True)
class Costs:
    """What a model's stages cost, and where the figures are from."""

    name: str
    source: str
    assumed: str
    stages: tuple[Stage, ...]
    kinds: tuple[RequestKind, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, default=COSTS, help="stage costs by model, as in stage_costs.json")
    parser.add_argument("--accelerators", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--peak", type=float, default=0.9, help="the most load, as a share of what the cluster can do")
    parser.add_argument("--slo-scale", type=float, default=5.0, help="the SLO, in latencies of a lone request")
    parser.add_argument("--start-s", type=float, help="seconds of a replica's start, instead of those of --costs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of arrivals; figures are their medians")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that simulate at a time")
    parser.add_argument("--validation-s", type=float, default=45, help="seconds of each load of the real application")
    parser.add_argument("--skip-validation", action="store_true", help="simulate only; scale.md says so")
    parser.add_argument("--keep-validation", action="store_true", help="simulate only; the comparison is the last one")
    options = parser.parse_args()
    if options.keep_validation:
        validation = json.loads((RAW / "scale.json").read_text(encoding="utf-8"))["validation"]
    else:
        validation = None if options.skip_validation else validate(options.validation_s, seed=0)
    given = json.loads(options.costs.read_text(encoding="utf-8"))
    if validation is not None:
        given[EMBEDDED] = as_costs(validation)
    comparisons = [
        (costs, accelerators, name, options.peak, seed)
        for costs in read_costs(given, options.slo_scale, options.start_s)
        for accelerators in sorted(options.accelerators, reverse=True)  # the longest first
        if costs.name != EMBEDDED or accelerators <= MOST_FOR_EMBEDDED
        for name in PROFILES
        if len(costs.kinds) > 1 or name != "change of mix"
        for seed in range(options.seeds if accelerators <= MOST_FOR_SEEDS else 1)
    ]
    with ProcessPoolExecutor(options.processes) as processes:
        rows = median_rows([row for rows in processes.map(compare, *zip(*comparisons, strict=True)) for row in rows])
    settings = {
        "peak": options.peak,
        "slo_scale": options.slo_scale,
        "start_s": options.start_s,
        "seeds": options.seeds,
    }
    result = {"machine": machine(), "settings": settings, "costs": given, "validation": validation, "rows": rows}
    write("scale", result, as_markdown(result))


def as_costs(validation: dict[str, Any]) -> dict[str, Any]:
    """The embedded model as measured, in the shape of an entry of --costs."""
    costs = validation["costs"]
    kind = {"seconds": costs["seconds"], "extra_s": max(0.0, costs["extra_s"] + costs["hand_over_s"])}
    return {
        "source": "measured in this run, by the stages' own clocks (one thread each)",
        "assumed": "start_s: 10 CPU seconds to import torch and diffusers; no batches",
        "stages": {"encoder": {"start_s": 10}, "denoiser": {"start_s": 10, "max_ongoing_requests": 4},
                   "vae": {"start_s": 10}},
        "kinds": {f"128x128, {validation['steps']} steps": kind},
    }  # fmt: skip


def read_costs(models_given: dict[str, Any], slo_scale: float, start_s: float | None) -> list[Costs]:
    """The models of --costs; each request's SLO is `slo_scale` times its latency on an idle cluster."""
    models = []
    for name, given in models_given.items():
        stages = [Stage(stage, **settings) for stage, settings in given["stages"].items()]
        if start_s is not None:
            stages = [replace(stage, start_s=start_s) for stage in stages]
        kinds = [RequestKind(kind, tuple(v["seconds"]), extra_s=v["extra_s"]) for kind, v in given["kinds"].items()]
        kinds = [replace(kind, slo_s=slo_scale * kind.alone_s) for kind in kinds]
        models.append(Costs(name, given["source"], given["assumed"], tuple(stages), tuple(kinds)))
    return models


def compare(costs: Costs, accelerators: int, profile_name: str, peak: float, seed: int) -> list[dict[str, Any]]:
    """Each policy under the same arrivals."""
    profile = PROFILES[profile_name]
    arrivals = arrivals_of(profile, costs.stages, costs.kinds, accelerators, peak, seed)
    slot_s = min(kind.slo_s for kind in costs.kinds) / SLOTS_A_SLO
    best = bound(costs.stages, arrivals, accelerators, slot_s)
    rows = []
    for name, (policy, initial) in policies(costs, accelerators, profile, peak).items():
        reached = run(costs, arrivals, accelerators, policy(), initial, best)
        row = {"model": costs.name, "accelerators": accelerators, "load": profile_name, "policy": name, **reached}
        rows.append(row)
        print(row, flush=True)
    return rows


def median_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (model, accelerators, load, policy): its medians over the seeds, and the goodput's range."""
    of_key: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        of_key.setdefault((row["model"], row["accelerators"], row["load"], row["policy"]), []).append(row)
    medians = []
    for same in of_key.values():
        middle = {k: v if isinstance(v, str) else statistics.median(row[k] for row in same) for k, v in same[0].items()}
        goodput = [row["goodput_of_best"] for row in same]
        medians.append(middle | {"seeds": len(same), "goodput_range": [min(goodput), max(goodput)]})
    return sorted(medians, key=lambda row: (row["model"], row["accelerators"]))


def policies(
    costs: Costs, accelerators: int, profile: Profile, peak: float
) -> dict[str, tuple[Callable[[], Policy], list[int]]]:
    """Each with the replicas that it starts with: the fixed ones all, the others what the first load needs."""
    mean = work_by_stage(costs.stages, costs.kinds, mean_second_kind(profile, costs.stages, costs.kinds))
    first = work_by_stage(costs.stages, costs.kinds, profile.second_kind(0.0))
    needed = min(accelerators, max(3, round(accelerators * peak * profile.share(0.0) / 0.8)))
    best, thirds = proportional(mean, accelerators), proportional([1, 1, 1], accelerators)
    start = proportional(first, needed)
    return {
        "replica ratio": (lambda: ReplicaRatio(accelerators, costs.stages), start),
        "Serve's default": (lambda: ServeDefault(len(costs.stages), accelerators), start),
        "fixed, by the mean work": (lambda: Fixed(best), best),
        "fixed, a third each": (lambda: Fixed(thirds), thirds),
    }


def run(
    costs: Costs, arrivals: list[Arrival], accelerators: int, policy: Policy, initial: list[int], best: Bound
) -> dict[str, Any]:
    outcome = simulate(costs.stages, arrivals, accelerators, policy, initial, refuse_late=True)
    latencies_s = [latency_s for _, latency_s in outcome.latencies_s]
    return {
        "arrived": outcome.num_arrived,
        "refused": outcome.num_refused,
        "good": outcome.num_good,
        "good_at_best": best.num_good,
        "goodput_of_best": outcome.num_good / best.num_good,
        "p50_s": percentile(latencies_s, 0.5),
        "p95_s": percentile(latencies_s, 0.95),
        "accelerator_hours": outcome.accelerator_s / 3600,
        "accelerator_hours_at_best": best.accelerator_s / 3600,
        "good_per_accelerator_hour_of_best": (outcome.num_good / outcome.accelerator_s)
        / (best.num_good / best.accelerator_s),
    }


def as_markdown(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = [
        "# Scaling policies on up to 1,000 accelerators, simulated",
        "",
        "`python -m benchmarks.scale`: a discrete-event simulation (`benchmarks/cluster_simulation.py` says what it "
        "leaves out) under Poisson arrivals. Goodput counts the requests that end within their SLO, "
        f"{settings['slo_scale']:g} times the latency of a lone request; what the ingress predicts to need more "
        f"than {REFUSE_FROM:.0%} of it is refused, whatever the policy. The best possible is a bound by a linear "
        "program (`benchmarks/goodput_bound.py`): it knows all arrivals beforehand, so no policy can reach it. At its "
        f"peak a load brings {settings['peak']:.0%} of the work that all accelerators can do. Every replica takes one "
        "accelerator, the small stages too. The replica-ratio policy is the application's own "
        "(`serve_app/autoscaling/`, docs/autoscaling.md), called as Serve calls it. Figures are medians over "
        f"{settings['seeds']} seeds of the arrivals, with the range of the goodput in brackets; one seed where there "
        f"are more than {MOST_FOR_SEEDS} accelerators.",
        "",
        *(f"- {name}: {profile.says}" for name, profile in PROFILES.items()),
        "",
    ]
    if result["validation"]:
        lines += validation_lines(result["validation"], result["machine"])
    else:
        lines += ["**Not validated in this run** (`--skip-validation`).", ""]
    for name, costs in result["costs"].items():
        lines += [f"## {name}", "", f"Stage costs: {costs['source']}. Assumed: {costs['assumed']}.", ""]
        heads = ("accelerators", "load", "policy", "goodput, of the best possible", "refused", "p50", "p95",
                 "accelerator hours", "good requests an hour, of the best")  # fmt: skip
        rows = [row for row in result["rows"] if row["model"] == name]
        lines += [*table(heads, [cells(row) for row in rows]), ""]
    return lines[:-1]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["accelerators"]), row["load"], row["policy"], goodput(row),
        f"{row['refused'] / row['arrived']:.1%}", f"{row['p50_s']:.1f} s", f"{row['p95_s']:.1f} s",
        f"{row['accelerator_hours']:.1f} (best {row['accelerator_hours_at_best']:.1f})",
        f"{row['good_per_accelerator_hour_of_best']:.0%}",
    )  # fmt: skip


def goodput(row: dict[str, Any]) -> str:
    least, most = row["goodput_range"]
    spread = f" ({least:.1%} to {most:.1%})" if row["seeds"] > 1 else ""
    return f"{row['goodput_of_best']:.1%}{spread}"


def validation_lines(validation: dict[str, Any], of_machine: dict[str, Any]) -> list[str]:
    costs = validation["costs"]
    seconds = ", ".join(f"{value * 1e3:.0f}" for value in costs["seconds"])
    heads = ("load", "", "requests/s", "p50", "p95", "encoder, denoiser, VAE (ms)")
    rows = []
    for row in validation["rows"]:
        rows.append((f"{row['load']:.0%}, {row['requests']} requests", "real", *shown(row["real"]),
                     ", ".join(f"{value * 1e3:.0f}" for value in row["mean_seconds"])))  # fmt: skip
        rows.append(("", "replayed", *shown(row["replayed"], row["real"]), "as in the real run"))
        rows.append(("", "predicted", *shown(row["predicted"], row["real"]), seconds))
    return [
        "## The simulation against a real application",
        "",
        f"The embedded model, {validation['steps']} steps, {validation['replicas']} denoisers of one thread and one "
        f"request at a time, on {of_machine['cores']} cores that other programs share (load average "
        f"{validation['load_average'][0]:.1f} before). All get the same Poisson arrivals. Predicted: with the mean "
        f"costs measured before ({seconds} ms, {costs['hand_over_s'] * 1e3:.0f} ms between two requests in a denoiser, "
        f"{(costs['extra_s'] + costs['hand_over_s']) * 1e3:.0f} ms for all else). Replayed: with the "
        "costs that each request had in the real run, which leaves queues, routing and hops to be predicted. In "
        "brackets the simulation as a multiple of the real run. This is a fit and not an independent test: the model "
        "was changed after earlier comparisons (one request at a time in a denoiser, the hand-over between two). "
        "Batches of a denoiser and starts of replicas are not part of this comparison.",
        "",
        *table(heads, rows),
        "",
    ]


def shown(found: dict[str, float], real: dict[str, float] | None = None) -> list[str]:
    texts = [f"{found['throughput']:.2f}", f"{found['p50_s']:.2f} s", f"{found['p95_s']:.2f} s"]
    if real is None:
        return texts
    return [f"{text} ({found[key] / real[key]:.2f})" for text, key in zip(texts, real, strict=True)]


if __name__ == "__main__":
    main()
