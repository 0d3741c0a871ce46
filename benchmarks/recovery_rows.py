"""What kills cost: the summary of single runs, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import table


@dataclass(frozen=True)
class Run:
    """One request whose replica was killed, and the same request undisturbed just before."""

    killed: str  # the deployment
    moment: str  # early, middle, late, or at work
    replicas: int  # of that deployment
    has_checkpoints: bool
    alone_s: float  # the undisturbed request
    total_s: float  # the request whose replica was killed
    killed_at_s: float  # after its begin
    noticed_s: float  # after the kill, until the path of the request goes on
    next_step_s: float | None  # after the kill, until a step that comes after it; None: all steps were done before
    extra_steps: int  # that were made again
    whole_s: float  # after the kill, until all replicas were there again


def summarize(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each (killed, moment, replicas), of medians; without checkpoints only what the request then takes."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.killed, run.moment, run.replicas), []).append(run)
    return [row_of(*key, group) for key, group in groups.items()]


def row_of(killed: str, moment: str, replicas: int, runs: Sequence[Run]) -> dict[str, Any]:
    kept = [run for run in runs if run.has_checkpoints]
    from_start = [run for run in runs if not run.has_checkpoints]
    steps_s = [run.next_step_s for run in kept if run.next_step_s is not None]
    return {
        "killed": killed,
        "moment": moment,
        "replicas": replicas,
        "runs": len(kept),
        "noticed_s": statistics.median(run.noticed_s for run in kept),
        "next_step_s": statistics.median(steps_s) if steps_s else None,
        "extra_steps": statistics.median(run.extra_steps for run in kept),
        "alone_s": statistics.median(run.alone_s for run in kept),
        "total_s": statistics.median(run.total_s for run in kept),
        "added_s": statistics.median(run.total_s - run.alone_s for run in kept),
        "whole_s": statistics.median(run.whole_s for run in kept),
        "from_start": without_checkpoints(from_start) if from_start else None,
    }


def without_checkpoints(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "extra_steps": statistics.median(run.extra_steps for run in runs),
        "added_s": statistics.median(run.total_s - run.alone_s for run in runs),
    }


def as_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ("killed", "at", "replicas", "death noticed", "next step", "steps again", "undisturbed", "with the kill",
             "added", "added without checkpoints", "steps again without", "all replicas back")  # fmt: skip
    return table(heads, [cells(row) for row in rows])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    without = row["from_start"]
    return (
        row["killed"],
        row["moment"],
        str(row["replicas"]),
        seconds(row["noticed_s"]),
        seconds(row["next_step_s"]),
        f"{row['extra_steps']:g}",
        seconds(row["alone_s"]),
        seconds(row["total_s"]),
        seconds(row["added_s"]),
        seconds(without and without["added_s"]),
        f"{without['extra_steps']:g}" if without else "",
        seconds(row["whole_s"]),
    )


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
