"""What the job store holds, as values: jobs, their outputs and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.messages import MediaKind, RequestWarning
from deployments.tracing import Carrier
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.jobs.codec import Asked, asked_from_json
from serve_app.making.admission import Size
from serve_app.storage.outputs import StoredFile

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled")
STATUSES: tuple[Status, ...] = ("queued", "in_progress", *ENDED)


@dataclass(frozen=True, kw_only=True)
class Output(StoredFile):
    """A file that a job made."""

    request: int  # its place among the job's requests


@dataclass(frozen=True)
class Job:
    """A job as it stands in the store; times are Unix times in seconds."""

    id: str
    kind: MediaKind
    owner: str
    status: Status
    progress: int  # 0..100; 100 if and only if completed
    created_at: float
    started_at: float | None
    completed_at: float | None  # when it ended, in whatever way
    expires_at: float | None
    requests: list[dict[str, Any]]  # see serve_app.jobs.codec
    shown: dict[str, Any]
    timings: dict[str, dict[str, float]]
    error: dict[str, Any] | None  # {"code", "message", ...}
    takeovers: int
    sizes: list[Size] = field(default_factory=list)  # of each of its requests
    outputs: tuple[Output, ...] = ()
    warnings: tuple[RequestWarning, ...] = ()
    is_awaited: bool = False  # a caller waits for its end
    taken_over: bool = False  # as a claim returns it: the runner before this one died with it

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def base_url(self) -> str | None:
        """The address that it was asked for under: its URLs stay the same, whoever reads them."""
        return self.shown.get("base_url")

    @property
    def asked(self) -> Asked:
        return asked_from_json(self.requests)


@dataclass(frozen=True)
class NewJob:
    """What `JobStore.add` needs."""

    id: str
    kind: MediaKind
    requests: list[dict[str, Any]]
    input_images: list[bytes] = field(default_factory=list, repr=False)
    shown: dict[str, Any] = field(default_factory=dict)
    owner: str = ""
    webhook_url: str | None = None  # gets a signed POST when the job ends
    sizes: list[Size] = field(default_factory=list)
    limits: TimeLimits = NO_LIMITS
    is_awaited: bool = False  # a caller waits for its end
    warnings: tuple[RequestWarning, ...] = ()  # known at the door


@dataclass(frozen=True)
class OverdueJob:
    """A job whose time is over: it had to begin, or to be done."""

    id: str
    limit: Literal["start_by", "cancel_at"]
    seconds: float  # that it was given


@dataclass(frozen=True)
class UnfinishedJob:
    """A job that waits or runs; `runner` is the name of who runs it."""

    id: str
    owner: str
    runner: str | None
    sizes: list[Size]
    is_awaited: bool = False
    model: str | None = None  # None: an earlier version wrote it down elsewhere


@dataclass(frozen=True)
class Webhook:
    """A job's end that is to be told to `url`; this is delivery number `attempt`: 1, 2, ..."""

    job_id: str
    kind: MediaKind
    status: Status
    completed_at: float
    url: str
    target: str  # its host and port
    attempt: int
    trace: Carrier = field(default_factory=dict)  # of the HTTP request that the job came with


@dataclass(frozen=True)
class IdempotencyKey:
    """The caller's key and what it stood for when it was first used."""

    key: str
    body_digest: str  # SHA-256, hexadecimal


@dataclass(frozen=True)
class Story:
    """What happened to a job after an event, and where it stands."""

    events: list[Event]
    last_number: int  # of all its events
    has_ended: bool
    position: int | None  # in the queue, while it waits


@dataclass(frozen=True)
class News:
    """What happened to jobs since somebody looked."""

    events: dict[str, list[Event]]
    gone: set[str]  # they were deleted
    positions: dict[str, int]  # of those that wait


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; numbers count 1, 2, ... within it."""

    number: int
    kind: str
    data: dict[str, Any]
    created_at: float
