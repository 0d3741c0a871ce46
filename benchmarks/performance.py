"""The tables and pictures of docs/performance.md, from the last runs of the benchmarks; its words are written by hand.

    python -m benchmarks.performance

A run leaves its raw figures in outputs/benchmarks, which git ignores. The few that the page shows are kept in
docs/benchmarks/figures.json, with date and machine; a benchmark that was not run here keeps what is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import side_by_side_report as side_by_side
from benchmarks.open_loop import percentile
from benchmarks.report import DOCS, RAW, table
from benchmarks.svg import Bar, bar_chart
from benchmarks.ways import LABELS

PAGE = Path("docs/performance.md")
IMAGES = Path("docs/images")
FIGURES = DOCS / "figures.json"
KINDS = ("compute", "loop", "media", "HTTP", "ingress", "hop", "transfer", "upload", "records", "queue")
DIGITS = 4  # significant, in figures.json

Figures = Mapping[str, Any]
Lines = list[str]


@dataclass(frozen=True)
class Kept:
    """What of a benchmark's raw result goes into figures.json."""

    benchmark: str
    of: Callable[[Figures], Figures]


def overhead(result: Figures) -> Figures:
    return {"rows": [{name: row[name] for name in ("steps", "alone_s", "served_s", "ratio")} for row in result["rows"]]}


def by_way(result: Figures) -> Figures:
    """Medians over the rounds, percentiles over all rounds' requests."""
    return {"rounds": result["rounds"], "scenarios": {
        name: {way: way_figures(rounds) for way, rounds in scenario["ways"].items()}
        for name, scenario in result["scenarios"].items()
    }}  # fmt: skip


def way_figures(rounds: list[Figures]) -> Figures:
    made = side_by_side.spread([side_by_side.throughput(one) for one in rounds])
    ratio = side_by_side.ratio_to_base(rounds)
    small_s = side_by_side.together(rounds)["latencies_s"].get("small", [])
    return {
        "throughput": made.middle if made else 0.0,
        "ratio": [ratio.middle, ratio.low, ratio.high] if ratio else None,
        "small_s": [percentile(small_s, 0.5), percentile(small_s, 0.95)] if small_s else None,
        "failures": sum(side_by_side.failures(rounds).values()),
        "requests": sum(one["requests"] for one in rounds),
    }


def milliseconds(result: Figures) -> Figures:
    names = ("steps", "served_s", "in_process_s", "ratio_to_in_process")
    return {"rows": [
        {name: row[name] for name in names} | {"kinds_s": {kind: row["kinds_s"][kind] for kind in KINDS}}
        for row in result["rows"]
    ]}  # fmt: skip


def engine(result: Figures) -> Figures:
    shown = {
        "throughput": ("model", "tokens", "gain", "gain_of_the_forward"),
        "lone_request": ("model", "tokens", "step_ms", "cost"),
        "mixed_load": ("model", "short_alone_ms", "short_p95_slack_ms", "short_p95_fifo_ms", "slowed_to_work"),
    }
    return {part: [{name: row[name] for name in names} for row in result[part]] for part, names in shown.items()}


def kills(result: Figures) -> Figures:
    names = ("killed", "moment", "replicas", "runs", "added_s", "extra_steps")
    return {"rows": [
        {name: row[name] for name in names} | {"from_start_s": (row["from_start"] or {}).get("added_s")}
        for row in result["rows"] if row["moment"] in ("late", "at work")
    ]}  # fmt: skip


def cancels(result: Figures) -> Figures:
    names = ("number", "freed_s", "largest_freed_s")
    return {"ways": {way: {name: row[name] for name in names} for way, row in result["ways"].items()}}


def overload(result: Figures) -> Figures:
    names = ("times", "seconds", "goodput_of_capacity", "requests", "refused", "latency_of_pictures", "max_queue_s")
    return {name: result[name] for name in names} | {"health_p95_s": result["watched"]["/health"]["latency"]["p95_s"]}


def scale(result: Figures) -> Figures:
    names = ("accelerators", "policy", "goodput_of_best")
    return {"rows": [
        {name: row[name] for name in names}
        for row in result["rows"] if row["model"] == "flux1_dev_h100" and row["load"] == "burst"
    ]}  # fmt: skip


KEPT = (
    Kept("overhead", overhead),
    Kept("side_by_side", by_way),
    Kept("stages", milliseconds),
    Kept("engine", engine),
    Kept("recovery", kills),
    Kept("cancel", cancels),
    Kept("overload", overload),
    Kept("scale", scale),
)


def served_table(figures: Figures) -> Lines:
    rows = [
        [f"{row['steps']}", f"{row['alone_s']:.2f} s", f"{row['served_s']:.2f} s", f"{row['ratio']:.2f}"]
        for row in figures["overhead"]["rows"]
    ]
    return [*table(["steps", "in process", "served", "ratio, median of rounds"], rows), measured(figures, "overhead")]


def callers_table(figures: Figures) -> Lines:
    scenarios = figures["side_by_side"]["scenarios"]
    eight, mixed = scenarios["closed_8"], scenarios["mixed"]
    rows = []
    for way in [way for way in LABELS if way in eight or way in mixed]:
        closed, among = eight.get(way), mixed.get(way)
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*closed["ratio"]) if closed and closed["ratio"] else ""
        latency = "{:.2f} s, {:.2f} s".format(*among["small_s"]) if among and among["small_s"] else ""
        failed = sum(each["failures"] for each in (closed, among) if each)
        rows.append([LABELS[way], f"{closed['throughput']:.2f}" if closed else "", ratio, latency, f"{failed}"])
    heads = ["way", "8 callers: pictures/s", "ratio to (a)", "mixed load: p50, p95 of the small ones", "failures"]
    return [*table(heads, rows), measured(figures, "side_by_side")]


def milliseconds_table(figures: Figures) -> Lines:
    stages = figures["stages"]["rows"]
    rows = [[kind, *(f"{1e3 * row['kinds_s'][kind]:.0f}" for row in stages)] for kind in KINDS]
    rows += [["**served**", *(f"**{1e3 * row['served_s']:.0f}**" for row in stages)]]
    rows += [["the pipeline in process", *(f"{1e3 * row['in_process_s']:.0f}" for row in stages)]]
    heads = ["milliseconds", *(f"{row['steps']} steps" for row in stages)]
    return [*table(heads, rows), measured(figures, "stages")]


def engine_table(figures: Figures) -> Lines:
    found = figures["engine"]
    lone = {(row["model"], row["tokens"]): f"{row['cost']:.1%}" for row in found["lone_request"]}
    rows = [
        [row["model"], f"{row['tokens']}", f"{row['gain']:.1f}", f"{row['gain_of_the_forward']:.1f}",
         lone.get((row["model"], row["tokens"]), "")]
        for row in found["throughput"]
    ]  # fmt: skip
    heads = ["model", "tokens", "eight together: gain", "gain of the forward alone", "cost for a lone request"]
    return [*table(heads, rows), measured(figures, "engine")]


def faults_table(figures: Figures) -> Lines:
    rows = [[what_was_killed(row), killed_cell(row)] for row in figures["recovery"]["rows"]]
    rows += [
        [f"{row['number']} cancels by {'a closed connection' if way == 'hang up' else 'the job route'}",
         f"denoiser free after {1e3 * row['freed_s']:.0f} ms (largest {1e3 * row['largest_freed_s']:.0f} ms)"]
        for way, row in figures["cancel"]["ways"].items()
    ]  # fmt: skip
    over = figures["overload"]
    rows.append([
        f"{over['times']:g} times the capacity for {over['seconds']:g} s, queue of {over['max_queue_s']:g} s",
        f"{over['goodput_of_capacity']:.0%} of the capacity served, {over['refused']} of {over['requests']} answered "
        f"429; p95 of pictures {over['latency_of_pictures']['p95_s']:.1f} s, of /health {over['health_p95_s']:.2f} s",
    ])  # fmt: skip
    return [*table(["event", "cost"], rows), measured(figures, "recovery", "cancel", "overload")]


def what_was_killed(row: Figures) -> str:
    spare = "with a spare replica" if row["replicas"] > 1 else "the only one"
    return f"`kill -9` of the {row['killed']}, {spare}, {row['moment']}"


def killed_cell(row: Figures) -> str:
    again = f", {row['extra_steps']} of 30 steps again" if row["extra_steps"] else ""
    start = f"; {row['from_start_s']:.1f} s without checkpoints" if row["from_start_s"] is not None else ""
    return f"{row['added_s']:.1f} s later, same bytes{again}{start}"


TABLES: Mapping[str, Callable[[Figures], Lines]] = {
    "served": served_table,
    "callers": callers_table,
    "milliseconds": milliseconds_table,
    "engine": engine_table,
    "faults": faults_table,
}


def milliseconds_chart(figures: Figures) -> str:
    """Shares, because 4 and 20 steps differ five-fold."""
    bars = [
        Bar(
            f"{row['steps']} steps",
            tuple(row["kinds_s"][kind] / row["served_s"] for kind in KINDS[:8]),
            f"{1e3 * row['served_s']:.0f} ms",
        )
        for row in figures["stages"]["rows"]
    ]
    return bar_chart("Where the time of a served picture goes", KINDS[:8], bars)


def mixed_chart(figures: Figures) -> str:
    mixed = figures["side_by_side"]["scenarios"]["mixed"]
    bars = [
        Bar(LABELS[way], (found["small_s"][1],), f"{found['small_s'][1]:.2f} s")
        for way, found in mixed.items() if found["small_s"]
    ]  # fmt: skip
    return bar_chart("p95 latency of small pictures beside a long one", ["p95"], bars)


def scale_chart(figures: Figures) -> str:
    bars = [
        Bar(f"{row['accelerators']}, {row['policy']}", (row["goodput_of_best"],), f"{row['goodput_of_best']:.0%}")
        for row in figures["scale"]["rows"]
    ]
    title = "Simulated goodput under 30-fold bursts, of the best possible, by accelerators and policy"
    return bar_chart(title, ["goodput"], bars)


CHARTS: Mapping[str, Callable[[Figures], str]] = {
    "performance-milliseconds.svg": milliseconds_chart,
    "performance-mixed-load.svg": mixed_chart,
    "performance-scale.svg": scale_chart,
}


def main() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for kept in KEPT:
        file = RAW / f"{kept.benchmark}.json"
        if file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
            figures[kept.benchmark] = rounded(dated(result) | dict(kept.of(result)))
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    for name, chart in CHARTS.items():
        (IMAGES / name).write_text(chart(figures), encoding="utf-8")


def filled(page: str, figures: Figures) -> str:
    """The page with the tables of `figures` between its markers; raises ValueError for a table without markers."""
    for name, lines_of in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = "\n".join(lines_of(figures))
        page, count = re.subn(pattern, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE}: the table {name!r} has {count} places, wanted 1")
    return page


def dated(result: Figures) -> dict[str, Any]:
    machine = result["machine"]
    return {"date": result["date"], "machine": {
        "cores": machine["cores"], "load_average": machine["load_average"][0],
        "python": machine["python"], "torch": machine["torch"],
    }}  # fmt: skip


def measured(figures: Figures, *benchmarks: str) -> str:
    """The line below a table: when, where, and with what load."""
    runs = [
        f"`python -m benchmarks.{name}`, {figures[name]['date']}, load average "
        f"{figures[name]['machine']['load_average']:.1f}"
        for name in benchmarks
    ]
    return f"\n*{'; '.join(runs)}.*"


def rounded(value: Any) -> Any:
    """With so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
