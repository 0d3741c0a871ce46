"""What happens beyond capacity: a minute of requests at five times the rate that the server can serve.

    python -m benchmarks.overload [--config FILE] [--max-queue-s S] [--times N] [--seconds S]
    python -m benchmarks.overload --base-url http://127.0.0.1:8000

A closed loop measures the capacity, then requests come as a Poisson process, whatever becomes of those before.
Goodput counts the pictures that came within the minute; 429 is the only other answer that is right. Meanwhile
/health and /v1/models, which nothing but the proxy and the ingress answer, are asked every second. Memory and
processor time are of the application's processes on this machine. Writes docs/benchmarks/overload.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.open_loop import Timed, open_loop, percentile, poisson_times
from benchmarks.openai_requests import OpenAIServer
from benchmarks.overhead import Application
from benchmarks.report import DOCS, machine, table, write
from serve_app.tools.launch import processes_of_session

BODY = {"size": "64x64", "num_inference_steps": 8}
TIMEOUT_S = 300.0
WARM_UP_S = 5.0
WATCH_EVERY_S = 1.0
SETTLE_S = 5.0  # after the last answer, until memory is looked at again
WATCHED = ("/health", "/v1/models")
TITLE = re.compile(r"ray::(?:ServeReplica:[^:]*:)?(\w+)")  # of Serve's processes
IDLE = "IDLE"  # workers that Ray has started in advance


@dataclass(frozen=True)
class Outcome:
    """The answer to one request; status 0: there was none."""

    status: int
    retry_after: str | None = None
    error_code: str | None = None
    pictures: int = 0

    @property
    def is_refusal(self) -> bool:
        return self.status == 429

    @property
    def says_when_to_come_back(self) -> bool:
        return self.retry_after is not None and self.retry_after.isdecimal() and int(self.retry_after) >= 1


@dataclass(frozen=True)
class Look:
    """A question that was asked beside the load."""

    path: str
    status: int
    seconds: float


@dataclass
class Watch:
    """What was seen beside the load."""

    looks: list[Look] = field(default_factory=list)
    memory_mb: list[dict[str, float]] = field(default_factory=list)  # by process; the first is of before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("ray_configs/serve_emoji_cpu.yaml"))
    parser.add_argument("--port", type=int, help="default: that of the config")
    parser.add_argument("--max-queue-s", type=float, default=10, help="admission.max_queue_s of the application")
    parser.add_argument("--base-url", help="of an application that runs already, in place of --config")
    parser.add_argument("--times", type=float, default=5, help="the rate offered, in capacities")
    parser.add_argument("--seconds", type=float, default=60, help="in which requests come")
    parser.add_argument("--capacity-seconds", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time that measure the capacity")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for overload.md")
    options = parser.parse_args()
    if options.base_url:
        result = asyncio.run(measure(options.base_url.rstrip("/").removesuffix("/v1"), options))
    else:
        with served(options) as url:
            result = asyncio.run(measure(url, options))
            result["max_queue_s"] = options.max_queue_s
    write("overload", result, as_markdown(result), options.output)


@contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """The application of the config, with the bound of its queue; its URL."""
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    config["http_options"]["port"] = options.port or config["http_options"]["port"]
    config["applications"][0]["args"]["admission"] = {"max_queue_s": options.max_queue_s}
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / options.config.name
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with Application(file, url):
            yield url


async def measure(base_url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with OpenAIServer(base_url, None, TIMEOUT_S, os.environ.get("OPENAI_API_KEY")) as server:
        http = server.http
        processes = processes_of(base_url)
        rate = await capacity(http, BODY, options.concurrency, options.capacity_seconds)
        print(f"capacity: {rate:.2f} pictures a second", flush=True)
        spent_s = processor_seconds(processes)
        began = time.perf_counter()
        timed, watch = await overload(http, BODY, options.times * rate, options.seconds, processes)
        elapsed_s = time.perf_counter() - began
        used = {name: (after - spent_s[name]) / elapsed_s for name, after in processor_seconds(processes).items()}
        await asyncio.sleep(SETTLE_S)
        after_mb = memory_mb(processes)
    return {
        "machine": machine(),
        "body": BODY,
        "times": options.times,
        "seconds": options.seconds,
        "concurrency": options.concurrency,
        "capacity": rate,
        **describe(timed, rate, options.seconds),
        "watched": {path: describe_looks([look for look in watch.looks if look.path == path]) for path in WATCHED},
        "memory_mb": {
            name: {
                "before": before,
                "peak": max(sample.get(name, 0.0) for sample in watch.memory_mb),
                "after": after_mb.get(name),
            }
            for name, before in watch.memory_mb[0].items()
        },
        "cores_used": used,
    }


# --- the load ---


async def capacity(http: httpx.AsyncClient, body: dict[str, Any], concurrency: int, seconds: float) -> float:
    """Pictures a second when `concurrency` callers ask one after the other, and those who get a 429 as it tells them.

    Raises RuntimeError if one of them gets neither.
    """
    await ask(http, body, -1)  # without a measurement admission has only a guess
    start = time.perf_counter() + WARM_UP_S
    ended_s: list[float] = []

    async def one_after_the_other(caller: int) -> None:
        number = caller
        while time.perf_counter() < start + seconds:
            outcome = await ask(http, body, number)
            number += concurrency
            if outcome.pictures:
                ended_s.append(time.perf_counter() - start)
            elif outcome.is_refusal and outcome.says_when_to_come_back:
                await asyncio.sleep(int(outcome.retry_after or 1))
            else:
                raise RuntimeError(f"the capacity cannot be measured: {outcome}")

    await asyncio.gather(*(one_after_the_other(caller) for caller in range(concurrency)))
    return sum(0 <= each < seconds for each in ended_s) / seconds


async def overload(
    http: httpx.AsyncClient, body: dict[str, Any], rate: float, seconds: float, processes: dict[str, psutil.Process]
) -> tuple[list[Timed[Outcome]], Watch]:
    """Offers `rate` requests a second and waits for all answers; what was seen meanwhile."""
    watch = Watch(memory_mb=[memory_mb(processes)])
    watching = [asyncio.create_task(look_every_second(http, path, watch)) for path in WATCHED]
    watching.append(asyncio.create_task(sample_memory(processes, watch)))
    try:
        timed = await open_loop(
            poisson_times(rate, seconds, seed=0), lambda number, _: ask(http, body, 1_000_000 + number)
        )
    finally:
        for task in watching:
            task.cancel()
    for ended in await asyncio.gather(*watching, return_exceptions=True):
        if not isinstance(ended, asyncio.CancelledError):
            raise RuntimeError("what was seen beside the load is not complete") from ended
    return timed, watch


async def ask(http: httpx.AsyncClient, body: dict[str, Any], number: int) -> Outcome:
    """A picture like no other: equal requests would share one generation."""
    body = body | {"prompt": f"fox number {number}", "seed": number}
    try:
        answer = await http.post("/v1/images/generations", json=body)
    except httpx.TransportError as error:
        return Outcome(0, error_code=type(error).__name__)
    if answer.status_code == 200:
        return Outcome(
            200, pictures=sum(bool(item.get("b64_json") or item.get("url")) for item in answer.json()["data"])
        )
    code = None
    with suppress(ValueError, KeyError, TypeError):  # some other server's answer, such as a proxy's
        code = answer.json()["error"]["code"]
    return Outcome(answer.status_code, answer.headers.get("retry-after"), code)


async def look_every_second(http: httpx.AsyncClient, path: str, watch: Watch) -> None:
    while True:
        began = time.perf_counter()
        try:
            status = (await http.get(path)).status_code
        except httpx.TransportError:
            status = 0
        watch.looks.append(Look(path, status, time.perf_counter() - began))
        await asyncio.sleep(max(0.0, began + WATCH_EVERY_S - time.perf_counter()))


# --- the application's processes ---


def processes_of(base_url: str) -> dict[str, psutil.Process]:
    """Serve's processes by name, of an application on this machine; none of one elsewhere."""
    if httpx.URL(base_url).host not in ("127.0.0.1", "localhost"):
        return {}
    stages = httpx.get(f"{base_url}/health", timeout=30).json()["stages"]
    session = os.getsid(next(stage["process_id"] for stage in stages.values()))
    found: dict[str, psutil.Process] = {}
    for process in processes_of_session(session):
        title = TITLE.match(" ".join(process.cmdline()))
        if title is not None and title[1] != IDLE:
            name = title[1] if title[1] not in found else f"{title[1]} {process.pid}"
            found[name] = process
    return found


async def sample_memory(processes: dict[str, psutil.Process], watch: Watch) -> None:
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        watch.memory_mb.append(await asyncio.to_thread(memory_mb, processes))


def memory_mb(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Proportional set sizes, so that pages shared between processes count once."""
    return {name: process.memory_full_info().pss / 1e6 for name, process in processes.items()}


def processor_seconds(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Of each process so far, and of this one."""
    times = {name: process.cpu_times() for name, process in [*processes.items(), ("this client", psutil.Process())]}
    return {name: each.user + each.system for name, each in times.items()}


# --- the report ---


def describe(timed: Sequence[Timed[Outcome]], rate: float, seconds: float) -> dict[str, Any]:
    made = [each for each in timed if each.answer.pictures]
    refused = [each for each in timed if each.answer.is_refusal]
    others = [each.answer for each in timed if not each.answer.pictures and not each.answer.is_refusal]
    goodput = sum(each.ended_s <= seconds for each in made) / seconds
    waits_s = [int(each.answer.retry_after) for each in refused if each.answer.says_when_to_come_back]  # type: ignore[arg-type]
    return {
        "requests": len(timed),
        "offered": len(timed) / seconds,
        "made": len(made),
        "goodput": goodput,
        "goodput_of_capacity": goodput / rate,
        "refused": len(refused),
        "refused_without_retry_after": len(refused) - len(waits_s),
        "retry_after_s": [min(waits_s), max(waits_s)] if waits_s else None,
        "other_answers": dict(Counter(f"{each.status} {each.error_code}" for each in others)),
        "latency_of_pictures": quantiles([each.latency_s for each in made]),
        "latency_of_refusals": quantiles([each.latency_s for each in refused]),
        "largest_lag_of_the_client_s": max((each.lag_s for each in timed), default=0.0),
    }


def describe_looks(looks: Sequence[Look]) -> dict[str, Any]:
    return {
        "asked": len(looks),
        "answered_200": sum(look.status == 200 for look in looks),
        "latency": quantiles([look.seconds for look in looks]),
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50_s": percentile(values, 0.5), "p95_s": percentile(values, 0.95), "max_s": max(values)}


def as_markdown(result: dict[str, Any]) -> list[str]:
    others = ", ".join(f"{count} times {kind}" for kind, count in result["other_answers"].items()) or "none"
    waits_s = result["retry_after_s"]
    queue = f" `admission.max_queue_s` is {result['max_queue_s']:g}." if "max_queue_s" in result else ""
    lines = [
        f"# Overload: {result['times']:g} times the capacity for {result['seconds']:g} s",
        "",
        f"`python -m benchmarks.overload`: pictures of {result['body']['size']}, "
        f"{result['body']['num_inference_steps']} steps, Poisson arrivals, client and server on one machine, "
        f"load average {result['machine']['load_average'][0]:.1f} at the end.{queue} "
        f"Capacity is what {result['concurrency']} callers get who ask one after the other.",
        "",
    ]
    lines += table(
        ("", "a second", "in all"),
        [
            ("capacity", f"{result['capacity']:.2f}", ""),
            ("offered", f"{result['offered']:.2f}", str(result["requests"])),
            ("pictures within the time (goodput)",
             f"{result['goodput']:.2f}: {result['goodput_of_capacity']:.0%} of capacity",
             f"{result['made']} in the end"),
            ("429", f"{result['refused'] / result['seconds']:.2f}",
             f"{result['refused']}, of which {result['refused_without_retry_after']} without Retry-After"),
            ("other answers", "", others),
        ],
    )  # fmt: skip
    if waits_s:
        lines += ["", f"Retry-After was {waits_s[0]} to {waits_s[1]} s."]
    lines += ["", *table(("latency", "p50", "p95", "max"), latencies(result))]
    health = result["watched"]["/health"]
    lines += ["", f"/health was asked every second and said 200 {health['answered_200']} of {health['asked']} times."]
    if result["memory_mb"]:
        rows = [
            (name, *(f"{each[when]:.0f} MB" for when in ("before", "peak", "after")),
             f"{result['cores_used'][name]:.2f}")
            for name, each in sorted(result["memory_mb"].items())
        ]  # fmt: skip
        rows.append(("this client", "", "", "", f"{result['cores_used']['this client']:.2f}"))
        lines += ["", *table(("process", "memory (PSS) before", "peak", "after", "cores used"), rows)]
    return [*lines, "", f"The client sent no request later than {result['largest_lag_of_the_client_s']:.2f} s after "
            "its time."]  # fmt: skip


def latencies(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    parts = {"pictures": result["latency_of_pictures"], "429": result["latency_of_refusals"]}
    parts |= {path: looks["latency"] for path, looks in result["watched"].items()}
    for name, found in parts.items():
        if found is not None:
            yield (name, *(f"{found[key]:.2f} s" for key in ("p50_s", "p95_s", "max_s")))


if __name__ == "__main__":
    main()
