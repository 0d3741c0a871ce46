"""Callers of a cluster in trouble: each asks again and again until the trouble is over, and keeps what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.faults.load import FINAL, Course, asked, client

PAUSE_S = 2  # between two questions after a job
CALL_TIMEOUT_S = 1800  # of one that waits: a busy machine takes minutes to load a replica
PICTURE = {"prompt": "a red apple", "size": "64x64", "deterministic": True, "response_format": "b64_json"}
VIDEO = {"prompt": "a red apple", "size": "64x64", "num_frames": 5, "deterministic": True, "num_inference_steps": 8}


@dataclass(frozen=True)
class Caller:
    """What one caller asks for: always the same request, by its seed."""

    kind: str  # "call": waits for the answer, once, without a key; "job": asks for the result later
    model: str
    seed: int
    steps: int = 8


@dataclass(frozen=True)
class Outcome:
    """What came of one request: the digest of its bytes, or why there are none."""

    caller: Caller
    seconds: float
    digest: str | None
    lost: str = ""


@dataclass
class Load:
    """`outcomes` grow while callers are at work; all are there after the context."""

    outcomes: list[Outcome] = field(default_factory=list)

    def lost(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.digest is None]

    def digests(self) -> dict[Caller, set[str]]:
        """The different bytes that each caller got."""
        found: dict[Caller, set[str]] = {}
        for each in self.outcomes:
            if each.digest is not None:
                found.setdefault(each.caller, set()).add(each.digest)
        return found

    def differing(self, *truths: dict[Caller, str]) -> list[Outcome]:
        """Those with other bytes than the undisturbed cluster makes, or made before and after an update."""
        made = [each for each in self.outcomes if each.digest is not None]
        return [each for each in made if each.digest not in {truth[each.caller] for truth in truths}]


def each_once(url: str, callers: Sequence[Caller]) -> list[Outcome]:
    """All at the same time."""
    return asyncio.run(_each_once(url, callers))


def undisturbed(url: str, callers: Sequence[Caller]) -> dict[Caller, str]:
    """What each gets when nothing happens. Raises RuntimeError where one gets nothing."""
    outcomes = each_once(url, callers)
    lost = [each for each in outcomes if each.digest is None]
    if lost:
        raise RuntimeError(f"without any trouble: {lost}")
    return {each.caller: str(each.digest) for each in outcomes}


@contextmanager
def load(url: str, callers: Sequence[Caller]) -> Iterator[Load]:
    """The callers are at work during the context; at its end each waits for its last answer."""
    is_over, work = threading.Event(), Load()
    thread = threading.Thread(target=lambda: asyncio.run(_until_over(url, callers, work, is_over)))
    thread.start()
    try:
        yield work
    finally:
        is_over.set()
        thread.join()


async def _each_once(url: str, callers: Sequence[Caller]) -> list[Outcome]:
    async with client(url) as http:
        return await asyncio.gather(*(_outcome(http, caller) for caller in callers))


async def _until_over(url: str, callers: Sequence[Caller], work: Load, is_over: threading.Event) -> None:
    async with client(url) as http:

        async def ask(caller: Caller) -> None:
            while not is_over.is_set():
                work.outcomes.append(await _outcome(http, caller))

        await asyncio.gather(*map(ask, callers))


async def _outcome(http: httpx.AsyncClient, caller: Caller) -> Outcome:
    began = time.monotonic()
    try:
        data = await (_by_job if caller.kind == "job" else _by_call)(http, caller)
        return Outcome(caller, time.monotonic() - began, hashlib.sha256(data).hexdigest())
    except (RuntimeError, httpx.HTTPError, KeyError, ValueError) as error:
        return Outcome(caller, time.monotonic() - began, None, f"{type(error).__name__}: {error}")


async def _by_call(http: httpx.AsyncClient, caller: Caller) -> bytes:
    """Tried once: what is not 200 is lost."""
    body = {**PICTURE, "model": caller.model, "seed": caller.seed, "num_inference_steps": caller.steps}
    answer = await http.post("/v1/images/generations", json=body, timeout=CALL_TIMEOUT_S)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code} {answer.text[:300]}")
    return str(answer.json()["data"][0]["b64_json"]).encode()


async def _by_job(http: httpx.AsyncClient, caller: Caller) -> bytes:
    of_both = {"model": caller.model, "seed": caller.seed}
    if caller.model == "wan":
        job = await _ended(http, "/v1/videos", {**VIDEO, **of_both})
        return (await _asked(http, "GET", f"/v1/videos/{job['id']}/content")).content
    body = {**PICTURE, **of_both, "num_inference_steps": caller.steps, "response_format": "url", "background": True}
    job = await _ended(http, "/v1/images/generations", body)
    return (await _asked(http, "GET", job["result"]["data"][0]["url"])).content


async def _ended(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The job, when it is over. Raises RuntimeError for one that ends badly, or is not known any more."""
    job = (await _asked(http, "POST", path, json=body, key=uuid.uuid4().hex)).json()
    while job["status"] not in FINAL:
        await asyncio.sleep(PAUSE_S)
        job = (await _asked(http, "GET", f"/v1/jobs/{job['id']}")).json()
    if job["status"] != "completed":
        raise RuntimeError(f"the job {job['status']}: {job.get('error')}")
    return dict(job)


async def _asked(http: httpx.AsyncClient, method: str, url: str, **more: Any) -> httpx.Response:
    """Tried again with the same Idempotency-Key, as HTTP clients do."""
    return await asked(http, method, url, Course(), patience_s=CALL_TIMEOUT_S, **more)
