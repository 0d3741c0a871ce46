"""One request to a server with OpenAI's API, from sending it to having what it made, and how it failed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

POLL_S = 0.1  # between looks at a video of a server without events; a latency is up to so much too long
PROGRESS_EVENTS = ("step", "preview")
LAST_EVENTS = ("completed", "failed", "cancelled", "deleted")


@dataclass(frozen=True)
class MixEntry:
    """Requests of one kind; `{number}` in the prompt makes each another request."""

    name: str
    media: Literal["image", "video"]
    weight: float
    body: dict[str, Any]
    slo_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    failure: str | None = None  # a kind of failure, such as http_429
    text: str = ""  # of the failure
    timings: list[dict[str, float]] = field(default_factory=list)  # of the server's stages, where it tells
    progress_s: float | None = None  # from sending to the first event of progress
    asked_more_s: float = 0.0  # after the request was done, to know more of it: no part of its latency


class RequestError(Exception):
    """A request that made nothing: its kind, and what was said."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def read_mix(file: Path) -> list[MixEntry]:
    """Raises ValueError that names the entry and what is wrong with it."""
    entries = []
    for index, given in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        try:
            entry = MixEntry(**given)
        except TypeError as error:
            raise ValueError(f"{file}, entry {index}: {error}") from error
        if entry.media not in ("image", "video"):
            raise ValueError(f"{file}, entry {index}: media must be image or video, got {entry.media!r}")
        if not entry.weight > 0:
            raise ValueError(f"{file}, entry {index}: weight must be above 0, got {entry.weight}")
        entries.append(entry)
    if not entries:
        raise ValueError(f"{file} has no entries")
    return entries


class OpenAIServer:
    """`async with` holds its connections, of which there is no limit: none waits for another."""

    def __init__(
        self,
        base_url: str,
        model: str | None,
        timeout_s: float,
        api_key: str | None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.http = httpx.AsyncClient(
            base_url=base_url, headers=headers, limits=limits, transport=transport, timeout=timeout_s
        )
        self.model, self.timeout_s = model, timeout_s

    async def __aenter__(self) -> OpenAIServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def find_model(self) -> None:
        """The first that the server lists, where none was named; some servers have no list and ask for none."""
        if self.model is None:
            answer = await self.http.get("/v1/models")
            if answer.status_code == 200 and answer.json()["data"]:
                self.model = answer.json()["data"][0]["id"]

    async def why_no_events(self, entry: MixEntry) -> str | None:
        """None if the server makes a picture as a job and tells its events; else the reason, for the report."""
        answer = await self.send(entry, -3, True)
        if answer.failure is not None:
            return f"a picture as a job ended as {answer.failure}"
        return None if answer.progress_s is not None else "the server told of no progress"

    async def send(self, entry: MixEntry, number: int, as_job: bool) -> Answer:
        """Does what `entry` says and waits for its end, which is at the latest after the timeout."""
        body = dict(entry.body)
        body["prompt"] = str(body.get("prompt", "")).replace("{number}", str(number))
        if self.model is not None:
            body.setdefault("model", self.model)
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                if entry.media == "video":
                    return await self.video(body, sent)
                return await (self.picture_job(body, sent) if as_job else self.picture(body))
        except RequestError as error:
            return Answer(error.kind, error.text)
        except (TimeoutError, httpx.TimeoutException):
            return Answer("timeout", f"after {self.timeout_s:g} s")
        except httpx.TransportError as error:
            return Answer(f"connection: {type(error).__name__}", str(error))

    async def picture(self, body: dict[str, Any]) -> Answer:
        answer = checked(await self.http.post("/v1/images/generations", json=body))
        content = answer.json()
        if not all(item.get("b64_json") or item.get("url") for item in content.get("data") or [{}]):
            raise RequestError("no picture in the answer", answer.text[:200])
        return Answer(timings=content.get("timings") or [])

    async def picture_job(self, body: dict[str, Any], sent: float) -> Answer:
        answer = checked(await self.http.post("/v1/images/generations", json=body | {"background": True}))
        if answer.status_code != 202:
            raise RequestError("no job", f"status {answer.status_code} to a request with background: true")
        return await self.followed(answer.json()["id"], sent)

    async def video(self, body: dict[str, Any], sent: float) -> Answer:
        created = checked(await self.http.post("/v1/videos", json=body)).json()
        probe = await self.http.get(f"/v1/jobs/{created['id']}")
        if probe.status_code == 200:
            return await self.followed(created["id"], sent)
        while True:
            video = checked(await self.http.get(f"/v1/videos/{created['id']}")).json()
            if video["status"] == "completed":
                return Answer()
            if video["status"] not in ("queued", "in_progress"):
                raise RequestError(f"job {video['status']}", json.dumps(video.get("error")))
            await asyncio.sleep(POLL_S)

    async def followed(self, job_id: str, sent: float) -> Answer:
        """A job by its events."""
        progress_s, last = None, "none"
        async with self.http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            if stream.status_code != 200:
                raise RequestError(f"http_{stream.status_code}", "of /v1/jobs/{id}/events")
            async for event in event_names(stream):
                if event in PROGRESS_EVENTS and progress_s is None:
                    progress_s = time.perf_counter() - sent
                if event in LAST_EVENTS:
                    last = event
                    break
        done = time.perf_counter()
        job = checked(await self.http.get(f"/v1/jobs/{job_id}")).json()
        if last != "completed":
            raise RequestError(f"job ended with {last}", json.dumps(job.get("error")))
        timings = (job.get("result") or {}).get("timings") or []
        return Answer(timings=timings, progress_s=progress_s, asked_more_s=time.perf_counter() - done)


def checked(answer: httpx.Response) -> httpx.Response:
    """Raises RequestError for all that is not a success."""
    if answer.is_success:
        return answer
    try:
        code = answer.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    raise RequestError(f"http_{answer.status_code}" + (f" {code}" if code else ""), answer.text[:200])


async def event_names(stream: httpx.Response) -> AsyncIterator[str]:
    """Of server-sent events."""
    async for line in stream.aiter_lines():
        if line.startswith("event:"):
            yield line.removeprefix("event:").strip()
