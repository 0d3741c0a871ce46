"""The most requests that any policy could finish within their SLO, by linear programming.

Time is cut into slots and requests into any fractions. The best plan knows all arrivals beforehand, chooses its
first replicas freely, runs stages in any order within a request's SLO, always has full batches, and pays for a
replica only the time that it takes to start. Each of these only makes it better than what can be done, so no
simulated policy can be above it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]

from benchmarks.cluster_simulation import Arrival, RequestKind, Stage

Terms = list[tuple[int, float]]  # (variable, coefficient)


@dataclass(frozen=True)
class Bound:
    num_good: float
    accelerator_s: float  # the least with which so many are possible


def bound(stages: Sequence[Stage], arrivals: Sequence[Arrival], num_accelerators: int, slot_s: float) -> Bound:
    """Raises RuntimeError if the solver fails."""
    program = Program(stages, arrivals, num_accelerators, slot_s)
    num_good = program.most_good()
    return Bound(num_good, program.least_accelerator_s(num_good * (1 - 1e-6)))


class Program:
    """Variables: good[g] of each group of arrivals, done[g, stage, slot], running[stage, slot], started[stage, slot].

    A group is the arrivals of one kind in one slot.
    """

    def __init__(
        self, stages: Sequence[Stage], arrivals: Sequence[Arrival], num_accelerators: int, slot_s: float
    ) -> None:
        self.slot_s = slot_s
        self.upper: list[float] = []
        self.rows: list[tuple[Terms, float]] = []  # sum of the terms <= the number
        groups = Counter((int(arrival.time_s / slot_s), arrival.kind) for arrival in arrivals)
        last_slot = {group: self.last_slot(*group) for group in groups}
        num_slots = 1 + max(last_slot.values())
        self.good = {
            group: self.variable(count if group[1].alone_s <= group[1].slo_s else 0) for group, count in groups.items()
        }
        self.running = [[self.variable() for _ in range(num_slots)] for _ in stages]
        work: list[list[Terms]] = [[[] for _ in range(num_slots)] for _ in stages]
        for group, good in self.good.items():
            for number in group[1].stages:
                stage = stages[number]
                done = [self.variable() for _ in range(group[0], last_slot[group] + 1)]
                self.rows.append(([(good, 1.0), *((each, -1.0) for each in done)], 0.0))
                seconds = group[1].seconds_in(number) * stage.least_cost
                for slot, each in enumerate(done, group[0]):
                    work[number][slot].append((each, seconds))
        occupied: list[Terms] = [[] for _ in range(num_slots)]
        for number, stage in enumerate(stages):
            starting_slots = int(stage.start_s / slot_s)
            for slot, running in enumerate(self.running[number]):
                self.rows.append(([*work[number][slot], (running, -slot_s)], 0.0))
                occupied[slot].append((running, float(stage.accelerators)))
                if slot and starting_slots:
                    started = self.variable()
                    self.rows.append(([(running, 1.0), (self.running[number][slot - 1], -1.0), (started, -1.0)], 0.0))
                    for before in range(max(0, slot - starting_slots), slot):
                        occupied[before].append((started, float(stage.accelerators)))
        self.rows += [(terms, float(num_accelerators)) for terms in occupied]
        self.accelerator_terms = [term for terms in occupied for term in terms]

    def last_slot(self, slot: int, kind: RequestKind) -> int:
        """The last in which a request of this slot may still be worked on for its SLO."""
        if math.isinf(kind.slo_s):
            raise ValueError(f"{kind.name} has no SLO: every request is good, whatever the policy")
        return math.floor(slot + 1 + kind.slo_s / self.slot_s)

    def variable(self, upper: float = math.inf) -> int:
        self.upper.append(upper)
        return len(self.upper) - 1

    def most_good(self) -> float:
        return -self.solve([(good, -1.0) for good in self.good.values()], [])

    def least_accelerator_s(self, num_good: float) -> float:
        """Of which so many requests can be good."""
        enough = ([(good, -1.0) for good in self.good.values()], -num_good)
        return self.slot_s * self.solve(self.accelerator_terms, [enough])

    def solve(self, objective: Terms, more_rows: list[tuple[Terms, float]]) -> float:
        """The least value of the objective."""
        rows = [*self.rows, *more_rows]
        cells = [(row, column, value) for row, (terms, _) in enumerate(rows) for column, value in terms]
        row_numbers, columns, values = zip(*cells, strict=True)
        matrix = coo_array((values, (row_numbers, columns)), shape=(len(rows), len(self.upper)))
        costs = np.zeros(len(self.upper))
        for column, value in objective:
            costs[column] += value
        limits = [limit for _, limit in rows]
        bounds = [(0.0, None if math.isinf(upper) else upper) for upper in self.upper]
        found = linprog(costs, A_ub=matrix.tocsr(), b_ub=limits, bounds=bounds, method="highs")
        if not found.success:
            raise RuntimeError(f"the linear program has no solution: {found.message}")
        return float(found.fun)
