"""Each fault of a table under load, and what became of every request; the figures of docs/reliability.md.

    python -m benchmarks.faults [--only "denoiser killed" ...] [--repeat N]

Needs root (a small volume is mounted, to be filled), PostgreSQL, and some 40 s for each fault: two nodes of Ray, two
models, S3 and PostgreSQL run on this machine. Exits with 1 when a request was lost or has other bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.cluster import ROOT, FaultCluster, fault_cluster
from benchmarks.faults.faults import FAULTS, Fault
from benchmarks.faults.load import COUNTS, PATIENCE_S, Course, Outcome, begin_load, client
from benchmarks.report import machine

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HIT_AT = 25  # percent of the steps of the first job that gets so far
HEADS = ("part", "fault", "requests", "lost", "other bytes", "steps again", "longest pause, s", "in all, s")
TABLE_HEAD = f"| {' | '.join(HEADS)} |\n|---|---|{'--:|' * (len(HEADS) - 2)}"


@dataclass(frozen=True)
class Row:
    """The figures of one fault."""

    fault: Fault
    outcomes: list[Outcome]
    truths: dict[tuple[str, int], str | None]
    steps_again: int
    pause_s: float
    seconds: float

    @property
    def lost(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.digest is None]

    @property
    def other(self) -> list[Outcome]:
        made = [each for each in self.outcomes if each.digest is not None]
        return [each for each in made if each.digest != self.truths[each.kind, each.seed]]

    def line(self) -> str:
        cells = (
            self.fault.part,
            self.fault.kind + (f" ({self.fault.repair})" if self.fault.repair else ""),
            len(self.outcomes),
            len(self.lost),
            len(self.other),
            self.steps_again,
            f"{self.pause_s:.1f}",
            f"{self.seconds:.0f}",
        )
        return f"| {' | '.join(str(cell) for cell in cells)} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help='such as "denoiser killed"')
    parser.add_argument("--repeat", type=int, default=1, help="how often each fault")
    args = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not args.only or f"{fault.part} {fault.kind}" in args.only]
    with fault_cluster() as cluster:
        rows = asyncio.run(run(cluster, [fault for fault in faults for _ in range(args.repeat)]))
    write_page(rows, is_whole=not args.only)
    return 1 if any(row.lost or row.other for row in rows) else 0


async def run(cluster: FaultCluster, faults: list[Fault]) -> list[Row]:
    async with client(cluster.url) as http:
        undisturbed = await asyncio.gather(*begin_load(http, Course()))
        truths = {(each.kind, each.seed): each.digest for each in undisturbed}
        failed = [each for each in undisturbed if each.digest is None]
        if failed:
            raise RuntimeError(f"without any fault: {failed}")
        print(TABLE_HEAD, flush=True)
        rows = []
        for fault in faults:
            await asyncio.to_thread(cluster.wait_until_healthy)
            rows.append(await one(cluster, fault, truths))
            print(rows[-1].line(), flush=True)
            for each in (*rows[-1].lost, *rows[-1].other):
                print(f"    {each}", flush=True)
        return rows


async def one(cluster: FaultCluster, fault: Fault, truths: dict[tuple[str, int], str | None]) -> Row:
    """The fault comes when a job is at a quarter of its work."""
    began, course, log = time.monotonic(), Course(), len(cluster.logs())
    async with client(cluster.url) as http:
        tasks = begin_load(http, course)
        await asyncio.wait_for(course.until_one_is_at(HIT_AT), PATIENCE_S)
        hit_at = time.monotonic()
        trouble = fault.on(cluster)
        await asyncio.to_thread(trouble.__enter__)
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(trouble.__exit__, None, None, None)
        outcomes = await asyncio.gather(*tasks)
    again = sum(int(steps) for steps in re.findall(r"\((\d+) steps? lost\)", cluster.logs()[log:]))
    return Row(fault, outcomes, truths, again, course.longest_pause_s(hit_at), time.monotonic() - began)


def write_page(rows: list[Row], is_whole: bool) -> None:
    """The table between the two marks; only a whole run replaces it."""
    if not is_whole:
        return
    requests = ", ".join(f"{count} × {kind}" for kind, count in COUNTS.items())
    figures = "\n".join((f"{machine()}. Each fault met {requests}.", "", TABLE_HEAD, *(row.line() for row in rows)))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{figures}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
