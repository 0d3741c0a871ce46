"""The load on a cluster in trouble: jobs of pictures and of videos, and synchronous calls."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

PATIENCE_S = 300
PAUSE_S = 0.25  # between two questions, and two tries
PICTURE = {"prompt": "a red apple", "size": "64x64", "num_inference_steps": 120, "deterministic": True}
VIDEO = {"prompt": "a red apple", "size": "64x64", "num_frames": 5, "num_inference_steps": 40, "deterministic": True}
FINAL = ("completed", "failed", "cancelled")


@dataclass
class Course:
    """What the load has done so far; `moved_at` are the moments of its steps and its ends."""

    moved_at: list[float] = field(default_factory=list)
    progress: dict[str, float] = field(default_factory=dict)  # of each request, in percent
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, request: str, progress: float) -> None:
        if progress > self.progress.get(request, 0):
            self.progress[request] = progress
            self.moved_at.append(time.monotonic())
            self.moved.set()

    async def until_one_is_at(self, percent: float) -> None:
        while max(self.progress.values(), default=0) < percent:
            self.moved.clear()
            await self.moved.wait()

    def longest_pause_s(self, since: float) -> float:
        moments = [since, *(moment for moment in self.moved_at if moment > since)]
        return max((later - earlier for earlier, later in itertools.pairwise(moments)), default=0.0)


@dataclass(frozen=True)
class Ask:
    """One request of a kind: `make` returns the bytes that came of it."""

    kind: str
    seed: int
    make: Callable[[httpx.AsyncClient, int, Course], Any]


async def picture_by_job(http: httpx.AsyncClient, seed: int, course: Course) -> bytes:
    body = {**PICTURE, "seed": seed, "background": True}
    job = await end_of_job(http, "/pictures", "/v1/images/generations", body, course)
    return (await asked(http, "GET", job["result"]["data"][0]["url"], course)).content


async def video_by_job(http: httpx.AsyncClient, seed: int, course: Course) -> bytes:
    job = await end_of_job(http, "/videos", "/v1/videos", {**VIDEO, "seed": seed}, course)
    return (await asked(http, "GET", f"/videos/v1/videos/{job['id']}/content", course)).content


async def waiting_call(http: httpx.AsyncClient, seed: int, course: Course) -> bytes:
    """A synchronous call with a key, made again when its connection is lost, as HTTP clients do."""
    body, key = {**PICTURE, "seed": seed, "response_format": "url"}, uuid.uuid4().hex
    answer = await asked(http, "POST", "/pictures/v1/images/generations", course, json=body, key=key)
    course.note(key, 100)
    return (await asked(http, "GET", answer.json()["data"][0]["url"], course)).content


KINDS = {"picture by a job": picture_by_job, "video by a job": video_by_job, "call that waits": waiting_call}
COUNTS = {"picture by a job": 3, "video by a job": 2, "call that waits": 3}


async def end_of_job(
    http: httpx.AsyncClient, prefix: str, path: str, body: dict[str, Any], course: Course
) -> dict[str, Any]:
    """Raises RuntimeError for a job that ends badly, or is not known any more."""
    job = (await asked(http, "POST", prefix + path, course, json=body, key=uuid.uuid4().hex)).json()
    while job["status"] not in FINAL:
        await asyncio.sleep(PAUSE_S)
        job = (await asked(http, "GET", f"{prefix}/v1/jobs/{job['id']}", course)).json()
        course.note(job["id"], job["progress"] + (job["status"] in FINAL))
    if job["status"] != "completed":
        raise RuntimeError(f"the job {job['status']}: {job.get('error')}")
    return dict(job)


async def asked(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    course: Course,
    key: str | None = None,
    patience_s: float = PATIENCE_S,
    **body: Any,
) -> httpx.Response:
    """Tried again after a lost connection, a 429 or a 5xx, with the same Idempotency-Key. Raises RuntimeError."""
    headers = {"Idempotency-Key": key} if key else {}
    give_up = time.monotonic() + patience_s
    while True:
        try:
            answer = await http.request(method, url, headers=headers, **body)
            said = f"{answer.status_code} {answer.text[:200] if answer.status_code >= 400 else ''}"
            if answer.status_code < 400:
                return answer
            if answer.status_code < 500 and answer.status_code != 429:
                raise RuntimeError(f"{method} {url}: {said}")
        except httpx.TransportError as error:
            said = repr(error)
        if time.monotonic() > give_up:
            raise RuntimeError(f"{method} {url}: gave up after {patience_s} s: {said}")
        await asyncio.sleep(PAUSE_S)


@dataclass(frozen=True)
class Outcome:
    """What came of one request: the digest of its bytes, or why there are none."""

    kind: str
    seed: int
    digest: str | None
    lost: str = ""


async def outcome_of(http: httpx.AsyncClient, kind: str, seed: int, course: Course) -> Outcome:
    try:
        data = await KINDS[kind](http, seed, course)
        return Outcome(kind, seed, hashlib.sha256(data).hexdigest())
    except (RuntimeError, httpx.HTTPError, KeyError, ValueError) as error:
        return Outcome(kind, seed, None, f"{type(error).__name__}: {error}")


def begin_load(http: httpx.AsyncClient, course: Course) -> list[asyncio.Task[Outcome]]:
    """COUNTS of each kind at once, with seeds from 1."""
    return [
        asyncio.create_task(outcome_of(http, kind, seed, course))
        for kind, count in COUNTS.items()
        for seed in range(1, count + 1)
    ]


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(PATIENCE_S, connect=5))
