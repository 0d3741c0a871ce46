"""A job from its asking to its end: asked for so that it is found again, followed by its events, cancelled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx2

from serve_app.tools.command.exits import CommandError, Exit
from serve_app.tools.command.server.client import Server, ServerEvent, unreachable
from serve_app.tools.command.shown.progress import Progress

ENDED = ("completed", "failed", "cancelled", "deleted")
MOST_TRIES = 6  # in a row without an event, over a minute
MAX_PAUSE_S = 16.0
WAITS = {"denoiser": "its turn at the denoiser", "device": "memory of the device", "storage": "the storage"}
PAUSES_S = (1.0, 4.0)  # before asking again for a job


def path_of(job_id: str, *more: str) -> str:
    return "/".join(("v1/jobs", quote(job_id, safe=""), *more))


def begin(server: Server, route: str, body: Mapping[str, Any], key: str) -> str:
    """The id of the job that makes what the body says; with the same key it is the same job, which is why it is asked
    for again where the answer was lost."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": key}
    path = f"v1/{route.removeprefix('/v1/')}"  # whatever the server names, it is one of its own
    for pause_s in PAUSES_S:
        try:
            return str(server.post(path, body, headers)["id"])
        except CommandError as error:
            if not is_answer_lost(error):
                raise
        time.sleep(pause_s)
    return str(server.post(path, body, headers)["id"])


def is_answer_lost(error: CommandError) -> bool:
    """Whether the server was reached, and may have begun the job."""
    cause = error.__cause__
    return isinstance(cause, httpx2.RequestError) and not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)


def follow(server: Server, job_id: str, progress: Progress) -> ServerEvent:
    """The last event. A connection that breaks is taken up again; raises CommandError where that does not help."""
    seen, tries = 0, 0
    while True:
        try:
            for event in server.events(path_of(job_id, "events"), seen):
                seen, tries = event.number or seen, 0
                tell(progress, event)
                if event.kind in ENDED:
                    return event
            lost: Exception = httpx2.RemoteProtocolError("the stream of events ended before the job")
        except httpx2.RequestError as error:
            lost = error
        tries += 1
        if tries >= MOST_TRIES:
            away = unreachable(server.name, lost)
            raise CommandError(f"{away.message} The job goes on: `triptych jobs watch {job_id}`", away.exit)
        progress.say(f"the connection is lost, trying again ({tries} of {MOST_TRIES - 1})")
        time.sleep(min(MAX_PAUSE_S, 0.5 * 2.0**tries))


def tell(progress: Progress, event: ServerEvent) -> None:
    data = event.data
    match event.kind:
        case "queued":
            before = data.get("position")
            progress.say(f"in the queue, {before} before it" if before else "in the queue")
        case "in_progress":
            progress.say("taken over by another replica" if data.get("taken_over") else "started")
        case "step":
            progress.step(data["progress"], data["step"], data["num_steps"], data.get("eta_s"))
        case "warning":
            progress.warn(data["message"])
        case "begun":
            progress.say("its turn has come")
        case "waiting":
            progress.say(waiting_for(data))
        case "completed":
            progress.done()


def waiting_for(data: dict[str, Any]) -> str:
    if data.get("for") == "model":
        about_s = data.get("about_s")
        return "the model was asleep and is loading" + (f", about {about_s} s" if about_s else "")
    return f"waiting for {WAITS.get(data.get('for', ''), 'what it needs')}"


def check_end(job_id: str, end: ServerEvent) -> None:
    """Raises CommandError for a job that made nothing."""
    if end.kind == "completed":
        return
    if end.kind == "deleted":
        raise CommandError(f"the job {job_id} was deleted")
    error = end.data.get("error") or {}
    message = error.get("message") or f"it is {end.kind}"
    if end.kind == "cancelled":
        raise CommandError(f"the job {job_id} was cancelled: {message}", Exit.FAILED, {"code": error.get("code")})
    is_callers = error.get("type") == "invalid_request_error"
    exit = Exit.REFUSED if is_callers else Exit.SERVERS_FAULT
    details = {"job": job_id, **{each: error.get(each) for each in ("code", "param", "type")}}
    raise CommandError(f"the job {job_id} failed: {message}", exit, details)


def cancel(server: Server, job_id: str) -> str:
    """What became of it, in words: one that has ended already cannot be cancelled."""
    try:
        server.post(path_of(job_id, "cancel"))
    except CommandError as error:
        return f"the job {job_id} could not be cancelled: {error.message}"
    return f"the job {job_id} is cancelled"
