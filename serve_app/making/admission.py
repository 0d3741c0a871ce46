"""What is let in: each request's seconds are predicted, and the queue is bounded in predicted seconds.

Each ingress replica predicts from what it has measured itself, and bounds what came in through it, and the jobs of
the application, whichever replica took them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, Media, StageDescription
from deployments.metrics.meter import NO_METER, Meter
from deployments.metrics.metric import hashed
from serve_app.errors import OverloadedError

SMOOTHING = 0.3  # weight of the newest measurement
MIN_BUSY_S = 1.0  # of work, before the pace of the stages is learned from it
DEFAULT_STEPS = 50
MOST_SIZES = 100  # whose seconds are remembered, the latest
MOST_PREDICTED = 10_000  # sizes, between two measurements

Shape = tuple[int, int, int]  # width, height, frames
Size = tuple[int, int, int, int]  # width, height, frames, steps


class AdmissionArgs(BaseModel):
    """Bounds of what waits and runs: what came in through one ingress replica, and the application's jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_queue_s: float = Field(
        600, gt=0, description="predicted seconds until all that runs, or that a caller waits for, is done"
    )
    max_queue_s_per_key: float | None = Field(
        None, gt=0, description="the share of it that one API key may use; default: all of it"
    )
    max_job_queue_s: float = Field(
        14_400, gt=0, description="the same together with the jobs that wait: beyond it new jobs get 429"
    )
    max_job_queue_s_per_key: float | None = Field(
        None, gt=0, description="the share of it that one API key may use; default: all of it"
    )
    max_pending: int = Field(
        200, ge=1, le=900, description="pictures and videos that callers wait for, let in and not yet done"
    )
    jobs_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="the share of the predicted work at the stages that jobs have while callers wait too, if so many "
        "jobs wait; 0: no more than `jobs.max_running`",
    )
    first_guess_s: float = Field(5, gt=0, description="seconds that a request counts before any was measured")


@dataclass
class CostModel:
    """Seconds of a request by its size and steps, learned from finished ones.

    A size that was not seen is taken from the nearest one, in proportion to its pixels x frames: attention
    grows faster, so the first request of a larger size is underestimated and the second is not.
    """

    first_guess_s: float
    step_s: dict[Shape, float] = field(default_factory=dict)
    decode_s: dict[Shape, float] = field(default_factory=dict)
    # Of a step and of decoding, as of the latest measurement: every request that waits is predicted again and again.
    _predicted: dict[Shape, tuple[float | None, float | None]] = field(default_factory=dict, init=False)

    def predict(self, shape: Shape, steps: int) -> float:
        if shape not in self._predicted:
            if len(self._predicted) >= MOST_PREDICTED:
                self._predicted.clear()
            self._predicted[shape] = _at(self.step_s, shape), _at(self.decode_s, shape)
        step_s, decode_s = self._predicted[shape]
        if step_s is None:
            return self.first_guess_s
        return steps * step_s + (decode_s or 0.0)

    def learn(self, shape: Shape, steps: int, seconds: dict[str, float]) -> None:
        """`seconds` are those of a Media; a part that was not measured is not learned."""
        if "denoiser_forwards" in seconds:
            _smooth(self.step_s, shape, seconds["denoiser_forwards"] / max(1, steps))
        _smooth(self.decode_s, shape, decode_seconds(seconds))
        self._predicted.clear()


def compute_seconds(seconds: dict[str, float]) -> float:
    """Of all that a Media says, what a device worked for this request alone."""
    return seconds.get("denoiser_forwards", 0.0) + decode_seconds(seconds)


def decode_seconds(seconds: dict[str, float]) -> float:
    return seconds.get("encode", 0.0) + seconds.get("decode", 0.0) + seconds.get("encode_media", 0.0)


def _smooth(known: dict[Shape, float], shape: Shape, measured: float) -> None:
    before = known.pop(shape, measured)
    known[shape] = before + SMOOTHING * (measured - before)
    if len(known) > MOST_SIZES:
        del known[next(iter(known))]


def _at(known: dict[Shape, float], shape: Shape) -> float | None:
    if not known:
        return None
    nearest = min(known, key=lambda other: abs(math.log(math.prod(other) / math.prod(shape))))
    return known[nearest] * math.prod(shape) / math.prod(nearest)


class Admission:
    """Counts what one ingress replica has let in; used from its event loop only.

    Jobs are in them too (serve_app.jobs.ledger). Those that wait are not in the way of those who wait for an answer
    (be it that of a job): few jobs run at a time. So they count for what new jobs are told, and not for the others.
    """

    def __init__(self, args: AdmissionArgs, meter: Meter = NO_METER) -> None:
        self.args = args
        self.meter = meter
        self.costs = CostModel(args.first_guess_s)
        self.pending: dict[str, list[Ticket]] = {}  # by caller
        self.pace = 1.0  # seconds of predicted work done per second, while there is some: grows with replicas
        self._busy_since: float | None = None
        self._work_done_s = 0.0
        self._refused = 0

    def admit(self, requests: list[GenerationRequest], description: StageDescription, key: str = "") -> list[Ticket]:
        """A ticket for each request, all or none; each must be closed. `key`: the label of the caller's API key.

        Raises OverloadedError when the queue is full, InvalidRequestError for what no empty queue could take.
        """
        return self._admit_awaited([size_of(request, description) for request in requests], key)

    def admit_job(self, sizes: Sequence[Size], key: str, is_awaited: bool = False) -> list[Ticket]:
        """The same for the requests of a job; `is_awaited`: a caller waits for its end."""
        if is_awaited:
            return self._admit_awaited(sizes, key)
        tickets = [self._ticket(size, key, is_waiting=True) for size in sizes]
        limits = self.args.max_job_queue_s, self.args.max_job_queue_s_per_key
        self._check_room(tickets, key, limits, with_waiting_jobs=True)
        self._enter(tickets, key)
        return tickets

    def _admit_awaited(self, sizes: Sequence[Size], key: str) -> list[Ticket]:
        """The same room for all that callers wait for, whether a job makes it or not."""
        if len(sizes) > self.args.max_pending:
            self._count_refused("too_long", len(sizes))
            raise InvalidRequestError(f"n: at most {self.args.max_pending}", "n", "limit_exceeded")
        tickets = [self._ticket(size, key, is_awaited=True) for size in sizes]
        limits = self.args.max_queue_s, self.args.max_queue_s_per_key
        self._check_room(tickets, key, limits, with_waiting_jobs=False)
        too_many = self._num_awaited + len(tickets) - self.args.max_pending
        if too_many > 0:
            self._refused += len(tickets)
            self._count_refused("pending", len(tickets))
            raise self.overloaded(wait_s=too_many * self.queue_s() / self.num_pending)
        self._enter(tickets, key)
        return tickets

    def enter_job(self, sizes: Sequence[Size], key: str, is_awaited: bool = False) -> list[Ticket]:
        """Tickets for a job that was let in before, by another replica or another life of this one."""
        tickets = [self._ticket(size, key, is_awaited, is_waiting=not is_awaited) for size in sizes]
        for ticket in tickets:
            ticket.is_from_elsewhere = True
        self._enter(tickets, key)
        return tickets

    def jobs_are_behind(self) -> bool:
        """Whether the jobs that run here have less than their share of what is at the stages, while callers wait.

        Stages take requests in the order in which they come there, so that a share of what waits is one of the work.
        """
        tickets = [ticket for each in self.pending.values() for ticket in each if not ticket.is_elsewhere]
        callers_s = self._predicted_s(ticket for ticket in tickets if ticket.is_awaited)
        jobs_s = self._predicted_s(ticket for ticket in tickets if not ticket.is_awaited and not ticket.is_waiting)
        return jobs_s < self.args.jobs_share * (callers_s + jobs_s)

    def _predicted_s(self, tickets: Iterable[Ticket]) -> float:
        """By what is known today: jobs may have been let in long ago."""
        return sum(self.costs.predict(ticket.shape, ticket.steps) for ticket in tickets)

    def queue_s(self, key: str | None = None, with_waiting_jobs: bool = True) -> float:
        """Predicted seconds until what was let in, of one caller or of all, is done."""
        callers = self.pending if key is None else (key,)
        tickets = (ticket for each in callers for ticket in self.pending.get(each, ()))
        return sum(ticket.cost_s for ticket in tickets if with_waiting_jobs or not ticket.is_waiting) / self.pace

    def take_refused(self) -> int:
        """Requests that there was no room for since this was last asked."""
        refused, self._refused = self._refused, 0
        return refused

    @property
    def num_pending(self) -> int:
        """Pictures and videos let in and not yet done, those of jobs too."""
        return sum(len(tickets) for tickets in self.pending.values())

    def overloaded(self, reason: str = "too many requests are waiting", wait_s: float | None = None) -> OverloadedError:
        """The refusal that says when to come back: in `wait_s`, or else when the next of what is pending is done."""
        if wait_s is None:
            wait_s = self.queue_s() / max(1, self.num_pending)
        seconds = max(1, math.ceil(wait_s))
        return OverloadedError(f"{reason}; try again in {seconds} s", seconds)

    def refused_for(self, reason: str, message: str) -> OverloadedError:
        """The refusal, and it counts: of one request or job by a bound that is kept elsewhere."""
        self._count_refused(reason, 1)
        return self.overloaded(message)

    def _count_refused(self, reason: str, count: int) -> None:
        self.meter.count("triptych_requests_refused_total", count, reason=reason)

    def tell(self, model: str) -> None:
        """What was let in and is not done, to the meter; `model`: the name of the one that all of it is for."""
        tickets = [ticket for each in self.pending.values() for ticket in each]
        callers, waiting = sum(ticket.is_awaited for ticket in tickets), sum(ticket.is_waiting for ticket in tickets)
        counts = {"callers": callers, "waiting_jobs": waiting, "running_jobs": len(tickets) - callers - waiting}
        for who, count in counts.items():
            self.meter.set("triptych_pending", count, model=model, who=who)
        limits = {"callers": self.args.max_queue_s, "all": self.args.max_job_queue_s}
        for queue, limit_s in limits.items():
            self.meter.set("triptych_queue_seconds", self.queue_s(None, queue == "all"), model=model, queue=queue)
            self.meter.set("triptych_queue_limit_seconds", limit_s, model=model, queue=queue)

    def count_work(self, seconds: float) -> None:
        """Predicted or measured seconds of work that are done: the pace is learned from them."""
        self._work_done_s += seconds
        busy_s = time.monotonic() - (self._busy_since or time.monotonic())
        if busy_s >= MIN_BUSY_S and self.num_pending > 1:  # with one alone, stages wait for each other
            self.pace += SMOOTHING * (max(0.1, self._work_done_s / busy_s) - self.pace)

    def begin_again(self) -> None:
        """The model was loaded: no work could be done before."""
        self._busy_since, self._work_done_s = time.monotonic(), 0.0

    @property
    def _num_awaited(self) -> int:
        """Those of this replica's callers."""
        tickets = (ticket for each in self.pending.values() for ticket in each)
        return sum(ticket.is_awaited and not ticket.is_from_elsewhere for ticket in tickets)

    def _check_room(
        self, tickets: list[Ticket], key: str, limits: tuple[float, float | None], with_waiting_jobs: bool
    ) -> None:
        """`limits`: seconds, of all callers and of one."""
        cost_s = sum(ticket.cost_s for ticket in tickets) / self.pace
        limit_s, key_limit_s = limits[0], limits[1] or math.inf
        if cost_s > min(limit_s, key_limit_s) and self.costs.step_s:
            self._count_refused("too_long", len(tickets))
            raise InvalidRequestError(
                f"this request would take about {cost_s:.0f} s, at most {min(limit_s, key_limit_s):g} s are allowed: "
                "ask for fewer or smaller pictures, or fewer steps",
                "num_inference_steps" if len(tickets) == 1 else "n",
                "limit_exceeded",
            )
        queue_s, key_queue_s = self.queue_s(None, with_waiting_jobs), self.queue_s(key, with_waiting_jobs)
        wait_s = max(queue_s + cost_s - limit_s, key_queue_s + cost_s - key_limit_s)
        # An empty queue takes what is guessed to be too long: it is the way to learn how long it really is.
        if wait_s > 0 and queue_s > 0:
            is_full = queue_s + cost_s > limit_s  # else it is the caller's own share that is full
            if is_full:
                self._refused += len(tickets)
            reasons = ("job_queue", "job_key_share") if with_waiting_jobs else ("queue", "key_share")
            self._count_refused(reasons[0 if is_full else 1], len(tickets))
            raise self.overloaded(wait_s=wait_s)

    def _ticket(self, size: Size, key: str, is_awaited: bool = False, is_waiting: bool = False) -> Ticket:
        width, height, frames, steps = size
        shape = width, height, frames
        return Ticket(self, key, shape, steps, self.costs.predict(shape, steps), is_awaited, is_waiting)

    def _enter(self, tickets: list[Ticket], key: str) -> None:
        if not self.pending:
            self._busy_since, self._work_done_s = time.monotonic(), 0.0
        if tickets:
            self.pending.setdefault(key, []).extend(tickets)

    def _close(self, ticket: Ticket) -> None:
        tickets = self.pending.get(ticket.key, [])
        if ticket not in tickets:
            return
        tickets.remove(ticket)
        if not tickets:
            del self.pending[ticket.key]

    def _learn(self, ticket: Ticket, media: Media) -> None:
        key = hashed(ticket.key)
        self.meter.count("triptych_key_compute_seconds_total", compute_seconds(media.seconds), key=key)
        self.meter.count("triptych_key_made_total", key=key)
        self.costs.learn(ticket.shape, ticket.steps, media.seconds)
        self.count_work(compute_seconds(media.seconds))


@dataclass(eq=False)
class Ticket:
    """One admitted request; it counts until its end, good or bad."""

    admission: Admission
    key: str
    shape: Shape
    steps: int
    cost_s: float
    is_awaited: bool = False  # a caller waits for it, be it that of a job
    is_waiting: bool = False  # it is a job's that nobody waits for, and no runner has begun with it
    is_elsewhere: bool = False  # it is a job's that another ingress replica runs
    is_from_elsewhere: bool = False  # it is a job's that another one let in: its caller takes no room of this one's

    @property
    def is_open(self) -> bool:
        return self in self.admission.pending.get(self.key, ())

    def close(self, task: object = None) -> None:
        """The request is over; closing twice is no error. May be the callback of a `task`."""
        self.admission._close(self)

    def learn(self, media: Media) -> None:
        """What it really took."""
        self.admission._learn(self, media)


def size_of(request: GenerationRequest, description: StageDescription) -> Size:
    """What decides how long a request takes."""

    def number(name: str, default: int | None) -> int:
        value = request.arguments.get(name) or description.parameters.get(name) or default or 1
        return max(1, int(value)) if isinstance(value, int | float) else 1

    width, height = number("width", description.default_width), number("height", description.default_height)
    steps = request.num_steps or number("num_inference_steps", DEFAULT_STEPS)
    return width, height, number("num_frames", 1), steps
