"""The same pictures made by diffusers alone, by two documented servers of it, and by this project, by turns.

    python -m benchmarks.side_by_side [--rounds 5] [--ways NAME ...] [--scenarios NAME ...] [--threads N] [--port P]

On an accelerator, with a checkpoint of real size (benchmarks/real_size.py) and pictures of 512 and 1,024 pixels:

    python -m benchmarks.side_by_side --model FOLDER --device cuda --scale 8 --ways in_process one_stage three_stage

Ways (benchmarks/ways.py): (a) diffusers in a process of its own; (b) Ray's documented Stable Diffusion example; (c)
the example of a server in diffusers' repository; (d) this project in one stage; (e) in three, (e2) with two
denoisers. In each round each way is started, measured and stopped, in another order each time; nothing else is up
but (a), which sleeps on its pipe, and makes the same pictures just before each closed loop: ratios are those of such
neighbours. Every picture is held against the one that (a) made of the same request: another picture is a failure,
as an error is. Writes docs/benchmarks/side_by_side.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks import report, side_by_side_report
from benchmarks.open_loop import open_loop, poisson_times
from benchmarks.openai_requests import RequestError
from benchmarks.ways import EMOJI, LABELS, Made, Picture, Processes, Running, Way, running

BASE = "in_process"
UTILISATION = 0.7  # of one pipeline that makes one picture at a time, in the mixed load
WRONG_PICTURE = 2.0  # levels of 255, the mean difference from which on it is another picture
PAUSE_S = 0.5  # between two turns
SETTLE_S = 5.0  # after a start: Ray still starts workers
REQUEST_TIMEOUT_S = 120


@dataclass(frozen=True)
class Kind:
    """Requests of one size; the words and the seed are those of their number."""

    name: str
    side: int
    steps: int
    text_tokens: int

    def scaled(self, scale: int) -> Kind:
        return replace(self, side=scale * self.side)

    def picture(self, number: int) -> Picture:
        noun = ("fox", "apple", "car", "tree", "star")[number % 5]
        colour = ("orange", "blue", "green", "red")[number % 4]
        return Picture(f"a big {noun} on a {colour} background", number, self.side, self.steps, self.text_tokens)


SMALL = Kind("small", side=64, steps=8, text_tokens=64)
SMALL_LONG_TEXT = Kind("small with long text", side=64, steps=8, text_tokens=512)
STANDARD = Kind("standard", side=128, steps=20, text_tokens=512)
LONG = Kind("long", side=128, steps=40, text_tokens=512)


@dataclass(frozen=True)
class Scenario:
    """`kinds` in the order in which they are asked for; `callers` wait for their answer before they ask again.

    Without callers the requests come at times of their own (a Poisson process), whatever became of those before.
    """

    title: str
    kinds: tuple[Kind, ...]
    callers: int | None
    ways: tuple[str, ...]

    def scaled(self, scale: int) -> Scenario:
        return replace(self, kinds=tuple(kind.scaled(scale) for kind in self.kinds))

    def pictures(self) -> list[Picture]:
        return [kind.picture(number) for number, kind in enumerate(self.kinds)]


ALL = tuple(LABELS)
AMONG_SEVERAL = tuple(way for way in ALL if way != "in_process_all_cores")
ALONE = ("in_process", "in_process_all_cores", "ray_example", "diffusers_server", "one_stage", "three_stage")
SERVERS = tuple(way for way in AMONG_SEVERAL if way != BASE)

# Each has the ways that differ in it: Ray's example with more replicas is no other for one caller, for instance.
# Several callers ask several times each: of the first and the last pictures no stage overlaps with others'.
SCENARIOS = {
    "sequential_small": Scenario("Small pictures, one at a time", (SMALL,) * 8, 1, ALONE),
    "sequential_standard": Scenario("Standard pictures, one at a time", (STANDARD,) * 2, 1, ALONE),
    "closed_4": Scenario("Small pictures, 4 callers", (SMALL,) * 32, 4, AMONG_SEVERAL),
    "closed_8": Scenario("Small pictures, 8 callers", (SMALL,) * 64, 8, ALL),
    "closed_8_long_text": Scenario(
        "Small pictures with long text, 8 callers",
        (SMALL_LONG_TEXT,) * 16,
        8,
        (BASE, "diffusers_server", "three_stage"),
    ),
    "burst": Scenario("A burst of 12 small pictures", (SMALL,) * 12, 12, AMONG_SEVERAL),
    "mixed": Scenario(
        "Mixed load: 12 small pictures and a long one", (SMALL,) * 4 + (LONG,) + (SMALL,) * 8, None, SERVERS
    ),
}


@dataclass(frozen=True)
class Attempt:
    """What became of one request: a picture or a failure."""

    kind: str
    picture: Picture
    latency_s: float  # from the time at which it was to be sent
    made: Made | None
    failure: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=LABELS, default=list(LABELS), help=f"{BASE} is always there")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic, in each process")
    parser.add_argument("--model", type=Path, default=EMOJI, help="a checkpoint folder of FLUX's kind")
    parser.add_argument("--device", default="cpu", help="such as cuda; (a) and one other way hold the model at once")
    parser.add_argument("--scale", type=int, default=1, help="times the sides of the pictures")
    parser.add_argument("--port", type=int, default=8890, help="of the way that is up")
    parser.add_argument("--output", type=Path, default=report.DOCS, help="folder for side_by_side.md")
    options = parser.parse_args()
    asyncio.run(write_each_round(options))


async def write_each_round(options: argparse.Namespace) -> None:
    """A run that is ended early leaves the rounds that it has made."""
    async for result in measure(options):
        report.write("side_by_side", result, side_by_side_report.as_markdown(result), options.output)


async def measure(options: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    """All that was found, after each round."""
    names = [name for name in LABELS if name in options.ways or name == BASE]
    scenarios = {name: SCENARIOS[name].scaled(options.scale) for name in options.scenarios}
    load_average, started = os.getloadavg(), psutil.cpu_times()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {way: [] for way in names if way in scenario.ways} for name, scenario in scenarios.items()
    }
    lone: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as folder:
        start = Starts(options, Path(folder))
        async with start(BASE) as base:
            references, alone_s = await make_references(base.way, list(scenarios.values()))
            for number in range(options.rounds):
                for way in rotated(names, number):
                    async with contextlib.nullcontext(base) if way == BASE else start(way) as up:
                        lone[way] = await lone_picture(up.way, references)
                        await asyncio.sleep(SETTLE_S)
                        for name, scenario in scenarios.items():
                            if way in rows[name]:
                                found = await turn(up, base, scenario, number, references, alone_s)
                                rows[name][way].append(found)
                                print(f"round {number + 1}, {name}, {way}: {found['throughput']:.2f}/s, "
                                      f"failures {found['failures'] or 'none'}", flush=True)  # fmt: skip
                yield {
                    "machine": report.machine() | {"load_average": load_average, "stolen": stolen_since(started)},
                    "model": options.model.name,
                    "device": options.device,
                    "threads": options.threads,
                    "rounds": number + 1,
                    "utilisation": UTILISATION,
                    "wrong_picture": WRONG_PICTURE,
                    "kinds": [asdict(kind.scaled(options.scale)) for kind in (SMALL, SMALL_LONG_TEXT, STANDARD, LONG)],
                    "alone_s": alone_s,
                    "lone": {way: lone[way] for way in names},
                    "scenarios": {
                        name: {"title": scenario.title, "ways": rows[name]} for name, scenario in scenarios.items()
                    },
                }  # fmt: skip


class Starts:
    """Starts one way, each time in a fresh folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.number = options, folder, 0

    def __call__(self, way: str) -> contextlib.AbstractAsyncContextManager[Running]:
        self.number += 1
        folder = self.folder / f"{self.number}-{way}"
        folder.mkdir()
        options = self.options
        return running(way, options.model.resolve(), options.device, options.threads, options.port, folder)


def stolen_since(before: Any) -> float:
    """The share of the processor time asked for since then that a virtual machine's host gave to others."""
    passed = {name: now - getattr(before, name) for name, now in psutil.cpu_times()._asdict().items()}
    asked_for = sum(passed.values()) - passed["idle"] - passed.get("guest", 0.0) - passed.get("guest_nice", 0.0)
    return float(passed.get("steal", 0.0) / asked_for) if asked_for else 0.0


def rotated(names: list[str], places: int) -> list[str]:
    return [names[(index + places) % len(names)] for index in range(len(names))]


async def make_references(
    base: Way, scenarios: Sequence[Scenario]
) -> tuple[dict[Picture, np.ndarray[Any, Any]], dict[str, float]]:
    """The pixels of every request by (a), and the median seconds of each kind."""
    pixels: dict[Picture, np.ndarray[Any, Any]] = {}
    seconds: dict[str, list[float]] = {}
    await base.make(scenarios[0].pictures()[0])  # the first one takes longer
    for scenario in scenarios:
        for kind, picture in zip(scenario.kinds, scenario.pictures(), strict=True):
            if picture not in pixels:
                started = time.perf_counter()
                pixels[picture] = pixels_of((await base.make(picture)).png)
                seconds.setdefault(kind.name, []).append(time.perf_counter() - started)
    return pixels, {name: statistics.median(values) for name, values in seconds.items()}


async def lone_picture(way: Way, references: dict[Picture, np.ndarray[Any, Any]]) -> dict[str, float]:
    """Warms the way up; the largest difference of a lone picture's pixels from (a)'s, by the picture's side."""
    largest: dict[str, float] = {}
    for picture in references:
        name = f"{picture.side}x{picture.side}, {picture.steps} steps, {picture.text_tokens} text tokens"
        if name not in largest:
            made = await way.make(picture, deterministic=True)
            largest[name] = float(np.abs(pixels_of(made.png) - references[picture]).max())
    return largest


async def turn(
    up: Running,
    base: Running,
    scenario: Scenario,
    number: int,
    references: dict[Picture, np.ndarray[Any, Any]],
    alone_s: dict[str, float],
) -> dict[str, Any]:
    """One scenario through one way, in round `number`, and a closed loop through (a) just before: its throughput."""
    throughput_of_base = None
    if scenario.callers is not None and BASE in scenario.ways:
        before = await measured(base, scenario, number, references, alone_s)
        throughput_of_base = before["throughput"]
    return await measured(up, scenario, number, references, alone_s) | {"throughput_of_base": throughput_of_base}


async def measured(
    up: Running,
    scenario: Scenario,
    number: int,
    references: dict[Picture, np.ndarray[Any, Any]],
    alone_s: dict[str, float],
) -> dict[str, Any]:
    """Figures, and each request's latency."""
    await asyncio.sleep(PAUSE_S)
    before = up.processes.seconds()
    started = time.perf_counter()
    if scenario.callers is None:
        mean_s = statistics.fmean(alone_s[kind.name] for kind in scenario.kinds)
        attempts = await mixed(up.way, scenario, arrivals(len(scenario.kinds), UTILISATION / mean_s, number))
    else:
        attempts = await closed_loop(up.way, scenario, scenario.callers)
    duration_s = time.perf_counter() - started
    after = up.processes.seconds()
    attempts = await asyncio.to_thread(judged, attempts, references)
    return figures(attempts, duration_s) | {"processor_s": Processes.difference(before, after)}


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """The first `count` moments in seconds of a Poisson process."""
    return poisson_times(rate, 100 * count / rate, seed)[:count]


async def closed_loop(way: Way, scenario: Scenario, callers: int) -> list[Attempt]:
    """So many callers, each of which asks for the next picture when it has the one before."""
    waiting = iter(list(zip(scenario.kinds, scenario.pictures(), strict=True)))
    attempts: list[Attempt] = []

    async def caller() -> None:
        for kind, picture in waiting:
            attempts.append(await attempt(way, kind, picture, time.perf_counter()))

    await asyncio.gather(*(caller() for _ in range(callers)))
    return attempts


async def mixed(way: Way, scenario: Scenario, times: list[float]) -> list[Attempt]:
    pictures = scenario.pictures()

    async def send(number: int, intended: float) -> Attempt:
        return await attempt(way, scenario.kinds[number], pictures[number], intended)

    return [timed.answer for timed in await open_loop(times, send)]


async def attempt(way: Way, kind: Kind, picture: Picture, intended: float) -> Attempt:
    """`intended` is on the clock of time.perf_counter."""
    made, failure = None, None
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            made = await way.make(picture)
    except RequestError as error:
        failure = error.kind
    except (TimeoutError, httpx.TimeoutException):
        failure = "timeout"
    except httpx.TransportError as error:
        failure = f"connection: {type(error).__name__}"
    return Attempt(kind.name, picture, time.perf_counter() - intended, made, failure)


def judged(attempts: Sequence[Attempt], references: dict[Picture, np.ndarray[Any, Any]]) -> list[Attempt]:
    """A picture that is not (a)'s of the same request becomes a failure; rounding in a batch does not."""
    return [
        Attempt(each.kind, each.picture, each.latency_s, None, "wrong picture")
        if each.made is not None and is_other(each.made.png, references[each.picture])
        else each
        for each in attempts
    ]


def is_other(png: bytes, reference: np.ndarray[Any, Any]) -> bool:
    pixels = pixels_of(png)
    return pixels.shape != reference.shape or float(np.abs(pixels - reference).mean()) > WRONG_PICTURE


def pixels_of(png: bytes) -> np.ndarray[Any, Any]:
    """[height, width, 3], in levels of 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def figures(attempts: Sequence[Attempt], duration_s: float) -> dict[str, Any]:
    """A failed request has no latency and is no throughput."""
    good = [each for each in attempts if each.made is not None]
    latencies_s: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(each.kind for each in attempts)}
    parts: dict[str, list[float]] = {}
    for each in good:
        latencies_s[each.kind].append(each.latency_s)
        for name, seconds in each.made.timings.items() if each.made else ():
            parts.setdefault(name, []).append(seconds)
    return {
        "requests": len(attempts),
        "failures": dict(Counter(each.failure for each in attempts if each.failure is not None)),
        "duration_s": duration_s,
        "throughput": len(good) / duration_s,
        "latencies_s": latencies_s,
        "timings": {name: statistics.median(values) for name, values in parts.items()},
    }


if __name__ == "__main__":
    main()
