"""A process whose requests let torch fail in their own code, at many depths of the C stack; it ends with "alive"."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber

REQUESTS, FORWARDS = 12, 40


def through_c(depth: int, work: Callable[[], Any]) -> None:
    """Calls `work` below `depth` frames of C code."""
    if depth:
        sorted([0], key=lambda _: (through_c(depth - 1, work), 0)[1])
    else:
        work()


def fail() -> None:
    for mistake in (lambda: torch.zeros(2) + torch.zeros(3), lambda: "a" * torch.zeros(3, dtype=torch.int64)):
        try:
            mistake()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("torch took what it should refuse")


def main() -> None:
    engine, model, depths = Engine(), torch.nn.Linear(8, 8), random.Random(0)

    def work(fiber: Fiber) -> None:
        for _ in range(FORWARDS):
            through_c(depths.randrange(8), lambda: engine.run(fiber, model, "model", None, (torch.ones(1, 8),), {}))
            through_c(depths.randrange(8), fail)

    def request(number: int) -> None:
        fiber = Fiber(str(number))
        engine.begin(fiber)
        engine.call(fiber, lambda: work(fiber))
        engine.end(fiber)

    with ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(request, range(REQUESTS)))
    engine.close()
    print("alive")


if __name__ == "__main__":
    main()
