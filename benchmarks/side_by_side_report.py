"""What benchmarks.side_by_side found: medians and spread over the rounds, ratios, goals, and its page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.open_loop import percentile
from benchmarks.report import table
from benchmarks.ways import LABELS

BASE = "in_process"
Round = Mapping[str, Any]  # one turn of a way, as side_by_side.figures gives it
Figure = Callable[[Round], float | None]


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    middle: float  # the median; of a percentile, that of all rounds' requests together
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.middle:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Goal:
    """In each round, `figure` of `way` divided by that of `against` (or the other way round, if less is better).

    A throughput against (a) is divided by (a)'s of just before.
    """

    scenario: str
    way: str
    against: str
    wanted: float
    figure: str  # a key of FIGURES


def throughput(one: Round) -> float | None:
    return float(one["throughput"])


def throughput_of_base(one: Round) -> float | None:
    """That of (a) just before; None in a scenario that (a) has no part in."""
    found: float | None = one["throughput_of_base"]
    return found


def p95_of(kind: str) -> Figure:
    def p95(one: Round) -> float | None:
        latencies_s = one["latencies_s"].get(kind)
        return percentile(latencies_s, 0.95) if latencies_s else None

    return p95


FIGURES: Mapping[str, tuple[str, Figure, bool]] = {  # how it is called, how it is found, whether more is better
    "throughput": ("throughput", throughput, True),
    "p95_small": ("p95 latency of the small pictures", p95_of("small"), False),
}
GOALS = (
    Goal("sequential_small", "three_stage", BASE, 0.97, "throughput"),
    Goal("sequential_standard", "three_stage", BASE, 0.97, "throughput"),
    Goal("closed_8", "three_stage", BASE, 1.5, "throughput"),
    Goal("closed_8", "three_stage_replicas", BASE, 1.5, "throughput"),
    Goal("closed_8_long_text", "three_stage", BASE, 1.5, "throughput"),
    *(
        Goal("mixed", "three_stage", rival, 2.0, "p95_small")
        for rival in ("ray_example", "ray_example_locked", "ray_example_replicas", "diffusers_server")
    ),
    Goal("mixed", "three_stage_replicas", "diffusers_server", 2.0, "p95_small"),
)


def spread(values: Sequence[float | None]) -> Spread | None:
    """None where no round has a value."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def ratio(rounds: Sequence[Round], against: Sequence[Round], figure: Figure) -> Spread | None:
    """Of the same rounds; a round in which either has no value, or the second none but 0, has no ratio."""
    pairs = [(figure(one), figure(other)) for one, other in zip(rounds, against, strict=True)]
    return spread([one / other if one is not None and other else None for one, other in pairs])


def ratio_to_base(rounds: Sequence[Round]) -> Spread | None:
    """Of each round's throughput to that of (a) just before."""
    pairs = [(throughput(one), throughput_of_base(one)) for one in rounds]
    return spread([ours / base if ours is not None and base else None for ours, base in pairs])


def reached(goal: Goal, scenarios: Mapping[str, Any]) -> Spread | None:
    """By what factor the goal's way is better; None where one of both ways, or the scenario, was not run."""
    ways = scenarios.get(goal.scenario, {}).get("ways", {})
    if goal.way not in ways or goal.against not in ways:
        return None
    _, figure, more_is_better = FIGURES[goal.figure]
    ours, theirs = ways[goal.way], ways[goal.against]
    if goal.against == BASE:
        return ratio_to_base(ours)
    if more_is_better:
        return ratio(ours, theirs, figure)
    both = [(a, b) for a, b in zip(theirs, ours, strict=True) if figure(a) is not None and figure(b) is not None]
    of_rounds = ratio([a for a, _ in both], [b for _, b in both], figure)
    of_all = ratio([together([a for a, _ in both])], [together([b for _, b in both])], figure)
    return replace(of_rounds, middle=of_all.middle) if of_rounds and of_all else None


def together(rounds: Sequence[Round]) -> Round:
    """The latencies of all rounds: of a dozen requests, the p95 is hardly more than the slowest."""
    kinds = {kind for one in rounds for kind in one["latencies_s"]}
    return {"latencies_s": {kind: [s for one in rounds for s in one["latencies_s"].get(kind, [])] for kind in kinds}}


def failures(rounds: Sequence[Round]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for one in rounds:
        for kind, count in one["failures"].items():
            counted[kind] = counted.get(kind, 0) + count
    return counted


def processor_ms_per_picture(rounds: Sequence[Round]) -> dict[str, float]:
    """The median over the rounds of each process' time, by requests asked for; those below 0.5 ms are left out."""
    names = sorted({name for one in rounds for name in one["processor_s"]})
    found = {
        name: statistics.median(1e3 * one["processor_s"].get(name, 0.0) / one["requests"] for one in rounds)
        for name in names
    }
    return {name: value for name, value in found.items() if value >= 0.5}


def as_markdown(result: Mapping[str, Any]) -> list[str]:
    scenarios = result["scenarios"]
    kinds = "; ".join(
        f"{kind['name']}: {kind['side']}x{kind['side']}, {kind['steps']} steps, {kind['text_tokens']} text tokens"
        for kind in result["kinds"]
    )
    machine = result["machine"]
    lines = [
        "# Side by side: the same pictures by diffusers alone, by two documented servers, and by this project",
        "",
        f"`python -m benchmarks.side_by_side`: {result['model']} on {result['device']}, {machine['cores']} cores, "
        f"load average {machine['load_average'][0]:.1f} at the start, {machine['stolen']:.0%} of the "
        "processor time that was asked for went to others on the host, "
        f"{result['threads']} thread(s) of arithmetic in each process, "
        f"{result['rounds']} rounds. Figures are the median over the rounds (lowest to highest), "
        "percentiles those of all rounds' requests. Each way is started, measured and stopped in each round; nothing "
        "else is up but (a), which sleeps, and makes the same pictures just before: ratios are to those.",
        "",
        f"Pictures: {kinds}. Each picture is held against the one that (a) made of the same request; more than "
        f"{result['wrong_picture']:g} levels of 255 away in the mean is a wrong picture, a failure. Failures are no "
        "throughput and have no latency.",
        "",
        "(b) is the example of Ray's documentation on a CPU: Serve runs its blocking method in five threads at once on "
        "one pipeline, which diffusers does not allow; (b1) is the same with `max_ongoing_requests: 1`, (b2) with two "
        "replicas of it, the most that the example's autoscaling allows. (c) is examples/server of diffusers. Both got "
        "a seed, steps, side and length of the text as parameters. (d) and (e) have the settings of "
        "ray_configs/serve_emoji_cpu.yaml, (e2) with two denoisers. "
        "One thread each, and yet three stages are three processes, (b2) two, and "
        "(c) up to one thread of arithmetic for each request under way: these can use several cores, (a) and (b1) "
        "one; (a2) is (a) with a thread for each core.",
        "",
        *table(["goal", "wanted", "found", ""], [goal_cells(goal, scenarios) for goal in GOALS]),
        "",
        "The largest difference of a lone picture's pixels from (a)'s, in levels of 255 (Triptych: `deterministic`):",
        "",
        *lone_table(result["lone"]),
    ]
    for scenario in scenarios.values():
        lines += ["", f"## {scenario['title']}", "", *scenario_table(scenario["ways"])]
        lines += profile(scenario["ways"])
    return lines


def goal_cells(goal: Goal, scenarios: Mapping[str, Any]) -> tuple[str, ...]:
    name, _, more_is_better = FIGURES[goal.figure]
    title = scenarios[goal.scenario]["title"] if goal.scenario in scenarios else goal.scenario
    against = LABELS[goal.against]
    found = reached(goal, scenarios)
    verdict = "not run" if found is None else "reached" if found.middle >= goal.wanted else "missed"
    what = f"{title}: {name} of {LABELS[goal.way]} against {against}" + ("" if more_is_better else ", times shorter")
    if found is not None:
        rounds = scenarios[goal.scenario]["ways"][goal.against]
        failed, asked = sum(failures(rounds).values()), sum(one["requests"] for one in rounds)
        verdict += f"; {failed} of the other's {asked} requests failed, and count in no latency" if failed else ""
    return what, f"{goal.wanted:g}", found.text() if found else "", verdict


def lone_table(lone: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for each in lone.values() for name in each))
    return table(
        ["way", *names], [[LABELS[way], *(f"{each.get(name, 0):g}" for name in names)] for way, each in lone.items()]
    )


def scenario_table(ways: Mapping[str, Sequence[Round]]) -> list[str]:
    kinds = list(dict.fromkeys(kind for rounds in ways.values() for one in rounds for kind in one["latencies_s"]))
    latency_heads = [f"p50, p95 of {kind}, all rounds" for kind in kinds]
    rows = []
    for way, rounds in ways.items():
        made = spread([throughput(one) for one in rounds])
        against_base = ratio_to_base(rounds)
        busy = spread([sum(one["processor_s"].values()) / one["duration_s"] for one in rounds])
        counted = failures(rounds)
        asked = sum(one["requests"] for one in rounds)
        rows.append(
            [
                LABELS[way],
                made.text() if made else "",
                against_base.text() if against_base else "",
                *(latency_cell([value for one in rounds for value in one["latencies_s"].get(kind, [])])
                  for kind in kinds),
                f"{sum(processor_ms_per_picture(rounds).values()):.0f}",
                f"{busy.middle:.2f}" if busy else "",
                ", ".join(f"{count} {kind}" for kind, count in counted.items()) + f" of {asked}" if counted else "none",
            ]
        )  # fmt: skip
    heads = ["way", "pictures/s", "ratio to (a)", *latency_heads, "processor ms per picture", "cores busy", "failures"]
    return table(heads, rows)


def latency_cell(latencies_s: Sequence[float]) -> str:
    if not latencies_s:
        return ""
    return f"{percentile(latencies_s, 0.5):.2f} s, {percentile(latencies_s, 0.95):.2f} s"


def profile(ways: Mapping[str, Sequence[Round]]) -> list[str]:
    """Where this project's processor time and latency go; nothing where neither of its ways was run."""
    lines = []
    for way in ("one_stage", "three_stage", "three_stage_replicas"):
        if way in ways:
            spent = ", ".join(f"{name} {ms:.0f}" for name, ms in processor_ms_per_picture(ways[way]).items())
            names = dict.fromkeys(name for one in ways[way] for name in one["timings"])
            parts = ", ".join(
                f"{name} {1e3 * statistics.median(one['timings'].get(name, 0.0) for one in ways[way]):.0f}"
                for name in names
            )
            lines += ["", f"{LABELS[way]}: processor ms per picture: {spent}. Its answers' timings, ms: {parts}."]
    return lines
