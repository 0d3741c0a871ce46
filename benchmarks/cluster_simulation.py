"""A discrete-event simulation of a Ray Serve application whose requests go through stages of replicas.

The stages are those of one model, or of several, one model's after the other's; a request goes through its own model's.

As in Serve, a request goes to the less busy of two random replicas that have room (max_ongoing_requests), and
otherwise waits at its caller, first come, first served. A replica works on up to `batch` requests at once.
A replica occupies its accelerators from the decision to start it until the last of its requests is done.

Left out: hops cost `extra_s` at the end of a request and no more, Serve's back-off between looks for a free
replica (25 ms and more) is zero, nothing fails, and a denoiser that is taken away ends what it has begun.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PUSH_S = 10.0  # between reports of the handles: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S
REFUSE_FROM = 0.9  # of the SLO: a prediction is a mean, and half of what is let in at all of it would be late
SMOOTHING = 0.2  # weight of the newest request in Report.request_s
TICK_S = 1.0  # between decisions; Serve's own is 0.1 s, which only matters below a second


@dataclass(frozen=True)
class Stage:
    """A deployment."""

    name: str
    start_s: float = 0.0  # from the decision until the replica serves
    max_ongoing_requests: int = 32
    batch: int = 1  # requests of a replica that share its device; the others wait in it
    marginal_cost: float = 1.0  # what each further request of a batch adds, as a share of a lone one
    accelerators: int = 1  # of one replica

    def slowdown(self, num_requests: float) -> float:
        """How much longer a request takes when the batch has so many."""
        return 1 + (num_requests - 1) * self.marginal_cost

    @property
    def least_cost(self) -> float:
        """Device seconds of a request in the best batch, as a share of those of a lone one."""
        largest = min(self.batch, self.max_ongoing_requests)
        return min(1.0, self.slowdown(largest) / largest)


@dataclass(frozen=True)
class RequestKind:
    """Requests that cost the same."""

    name: str
    seconds: tuple[float, ...]  # of a lone request on the device of each of its model's stages
    slo_s: float = float("inf")
    extra_s: float = 0.0  # HTTP, hops, writing the file: waits for nothing and occupies nothing
    first_stage: int = 0  # the number of its model's first stage

    @property
    def alone_s(self) -> float:
        """End to end on an idle cluster."""
        return sum(self.seconds) + self.extra_s

    @property
    def stages(self) -> range:
        """The numbers of the stages that it goes through."""
        return range(self.first_stage, self.first_stage + len(self.seconds))

    def seconds_in(self, stage: int) -> float:
        return self.seconds[stage - self.first_stage]


@dataclass(frozen=True)
class Arrival:
    time_s: float
    kind: RequestKind


@dataclass(frozen=True)
class Report:
    """What the handles and replicas told the controller at one moment; sequences are by stage."""

    time_s: float
    ongoing: tuple[int, ...]  # requests waiting for or on a replica
    ongoing_integral: tuple[float, ...]  # of it over time since the start, in request-seconds
    arrived: tuple[int, ...]  # requests that have come to the stage, refused ones not
    refused: tuple[int, ...]  # requests that would have come to the stage next, but for the ingress
    arrived_s: tuple[float, ...]  # device seconds that those ask for which have come
    outstanding_s: tuple[float, ...]  # device seconds of the ongoing ones that are still to be done
    request_s: tuple[float, ...]  # device seconds of a request, by the latest that have ended; 0 before the first


@dataclass(frozen=True)
class View:
    """What a policy sees."""

    time_s: float
    reports: Sequence[Report]  # oldest first
    running: tuple[int, ...]  # replicas by stage
    target: tuple[int, ...]

    def mean_ongoing(self, stage: int, look_back_s: float) -> float:
        """The mean as Serve's controller has it: over what the last report covers, its last value holding since."""
        last = self.reports[-1]
        first = next(r for r in self.reports if r.time_s >= last.time_s - look_back_s - 1e-9)
        since_s = self.time_s - last.time_s
        covered_s = last.time_s - first.time_s + since_s
        if covered_s <= 0:
            return float(last.ongoing[stage])
        before = last.ongoing_integral[stage] - first.ongoing_integral[stage]
        return (before + since_s * last.ongoing[stage]) / covered_s


Policy = Callable[[View], Sequence[int]]  # the wanted number of replicas of each stage


@dataclass
class Outcome:
    """What became of the arrivals."""

    latencies_s: list[tuple[RequestKind, float]] = field(default_factory=list)  # of the finished ones
    num_arrived: int = 0
    num_refused: int = 0
    accelerator_s: float = 0.0  # occupied, from start to end of the run
    num_starts: int = 0  # of replicas, those of the beginning not
    ended_s: float = 0.0

    @property
    def num_good(self) -> int:
        return sum(latency_s <= kind.slo_s for kind, latency_s in self.latencies_s)


class Request:
    __slots__ = ("arrived_s", "kind", "stage")

    def __init__(self, kind: RequestKind, arrived_s: float) -> None:
        self.kind, self.arrived_s, self.stage = kind, arrived_s, kind.first_stage


class Replica:
    """It shares its device among the active requests: each has `work` done, which all advance at one pace."""

    __slots__ = (
        "active", "draining", "generation", "ongoing", "pool", "position", "running", "seen_s", "waiting", "work",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.running = self.draining = False
        self.position = -1  # in pool.free
        self.ongoing = 0
        self.active: list[tuple[float, int, Request]] = []  # (the `work` at which it is done, number, request)
        self.waiting: deque[Request] = deque()
        self.work = self.seen_s = 0.0
        self.generation = 0  # of the event of its next end; older events are void


class Pool:
    """The replicas of a stage and the requests that wait for one."""

    def __init__(self, stage: Stage, index: int) -> None:
        self.stage, self.index, self.least_cost = stage, index, stage.least_cost
        self.replicas: list[Replica] = []  # starting and running, not draining
        self.free: list[Replica] = []  # running, with room
        self.queue: deque[Request] = deque()
        self.target = 0
        self.ongoing = 0
        self.ongoing_integral = self.ongoing_seen_s = 0.0
        self.num_running = 0  # of `replicas`
        self.busy: dict[Replica, None] = {}  # in order; draining ones too
        self.arrived = self.refused = 0
        self.arrived_s = self.waiting_s = 0.0  # device seconds, in full batches: of all arrivals, of what waits here
        self.request_s = 0.0

    def cost_s(self, kind: RequestKind) -> float:
        return kind.seconds_in(self.index) * self.least_cost

    def note_end(self, kind: RequestKind) -> None:
        cost_s = self.cost_s(kind)
        self.request_s += SMOOTHING * (cost_s - self.request_s) if self.request_s else cost_s

    def outstanding_s(self) -> float:
        """Of what waits and of what is in work."""
        in_work_s = sum(end - replica.work for replica in self.busy for end, _, _ in replica.active)
        return max(0.0, self.waiting_s + in_work_s * self.least_cost)


class Cluster:
    """The state of the simulation; `simulate` is what others call."""

    def __init__(
        self, stages: Sequence[Stage], num_accelerators: int, policy: Policy, initial: Sequence[int], seed: int,
        refuse_late: bool,
    ) -> None:  # fmt: skip
        self.pools = [Pool(stage, index) for index, stage in enumerate(stages)]
        self.num_accelerators, self.policy, self.refuse_late = num_accelerators, policy, refuse_late
        self.occupied = self.num_starts = 0
        self.occupied_seen_s = 0.0
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, Callable[..., None], object, int]] = []
        self.numbers = 0
        self.now = 0.0
        self.in_flight = 0
        self.outcome = Outcome()
        self.reports: deque[Report] = deque(maxlen=64)
        for pool, count in zip(self.pools, initial, strict=True):
            pool.target = count
            for _ in range(count):
                self.count_accelerators(pool.stage.accelerators)
                replica = Replica(pool)
                pool.replicas.append(replica)
                self.serve(replica)

    def at(self, time_s: float, function: Callable[..., None], subject: object = None, generation: int = 0) -> None:
        self.numbers += 1
        heapq.heappush(self.events, (time_s, self.numbers, function, subject, generation))

    # -- requests ---------------------------------------------------------------------------------------------

    def arrive(self, kind: RequestKind) -> None:
        self.outcome.num_arrived += 1
        if self.refuse_late and self.predicted_s(kind) > REFUSE_FROM * kind.slo_s:
            self.outcome.num_refused += 1
            self.pools[kind.first_stage].refused += 1
            return
        self.in_flight += 1
        self.enter(Request(kind, self.now))

    def predicted_s(self, kind: RequestKind) -> float:
        """The latency that an ingress would predict: in batches and behind queues as they are now."""
        latency_s = kind.extra_s
        for stage, seconds in zip(kind.stages, kind.seconds, strict=True):
            pool = self.pools[stage]
            num_running = max(1, pool.num_running)
            batch = min(pool.stage.batch, max(1.0, pool.ongoing / num_running))
            latency_s += seconds * pool.stage.slowdown(batch) + pool.waiting_s / num_running
        return latency_s

    def enter(self, request: Request) -> None:
        """The request comes to its next stage."""
        pool = self.pools[request.stage]
        self.count_ongoing(pool, 1)
        pool.arrived += 1
        pool.arrived_s += pool.cost_s(request.kind)
        pool.waiting_s += pool.cost_s(request.kind)
        if pool.free:
            self.assign(self.choose(pool), request)
        else:
            pool.queue.append(request)

    def choose(self, pool: Pool) -> Replica:
        """Power of two choices."""
        free = pool.free
        first = free[int(self.random.random() * len(free))]
        second = free[int(self.random.random() * len(free))]
        return first if first.ongoing <= second.ongoing else second

    def assign(self, replica: Replica, request: Request) -> None:
        replica.ongoing += 1
        if replica.ongoing >= replica.pool.stage.max_ongoing_requests:
            self.take_from_free(replica)
        self.advance(replica)
        if len(replica.active) < replica.pool.stage.batch:
            self.activate(replica, request)
        else:
            replica.waiting.append(request)
        self.schedule_end(replica)

    def activate(self, replica: Replica, request: Request) -> None:
        self.numbers += 1
        replica.pool.busy[replica] = None
        replica.pool.waiting_s -= replica.pool.cost_s(request.kind)
        heapq.heappush(replica.active, (replica.work + request.kind.seconds_in(request.stage), self.numbers, request))

    def advance(self, replica: Replica) -> None:
        """Brings the work of the active requests up to now."""
        if replica.active:
            replica.work += (self.now - replica.seen_s) / replica.pool.stage.slowdown(len(replica.active))
        replica.seen_s = self.now

    def schedule_end(self, replica: Replica) -> None:
        """The event at which the first of the active requests is done, if no other joins or leaves before."""
        replica.generation += 1
        if replica.active:
            left = max(0.0, replica.active[0][0] - replica.work)
            end_s = self.now + left * replica.pool.stage.slowdown(len(replica.active))
            self.at(end_s, self.end, replica, replica.generation)

    def end(self, replica: Replica, generation: int) -> None:
        if generation != replica.generation:
            return
        pool = replica.pool
        self.advance(replica)
        _, _, request = heapq.heappop(replica.active)
        pool.note_end(request.kind)
        replica.ongoing -= 1
        if not replica.active:
            del pool.busy[replica]
        if replica.waiting:
            self.activate(replica, replica.waiting.popleft())
        self.count_ongoing(pool, -1)
        if replica.draining:
            self.schedule_end(replica)
            if not replica.ongoing:
                self.count_accelerators(-pool.stage.accelerators)
        elif pool.queue:
            self.assign(replica, pool.queue.popleft())
        else:
            self.schedule_end(replica)
            self.add_to_free(replica)
        request.stage += 1
        if request.stage in request.kind.stages:
            self.enter(request)
        else:
            self.in_flight -= 1
            latency_s = self.now - request.arrived_s + request.kind.extra_s
            self.outcome.latencies_s.append((request.kind, latency_s))

    def count_ongoing(self, pool: Pool, change: int) -> None:
        pool.ongoing_integral += pool.ongoing * (self.now - pool.ongoing_seen_s)
        pool.ongoing_seen_s = self.now
        pool.ongoing += change

    # -- replicas ---------------------------------------------------------------------------------------------

    def add_to_free(self, replica: Replica) -> None:
        if replica.position < 0:
            replica.position = len(replica.pool.free)
            replica.pool.free.append(replica)

    def take_from_free(self, replica: Replica) -> None:
        if replica.position >= 0:
            last = replica.pool.free.pop()
            if last is not replica:
                replica.pool.free[replica.position] = last
                last.position = replica.position
            replica.position = -1

    def count_accelerators(self, change: int) -> None:
        self.outcome.accelerator_s += self.occupied * (self.now - self.occupied_seen_s)
        self.occupied_seen_s = self.now
        self.occupied += change

    def serve(self, replica: Replica, _: int = 0) -> None:
        """The replica has started; void if it was given up meanwhile."""
        if replica.draining:
            return
        replica.running = True
        pool = replica.pool
        pool.num_running += 1
        while pool.queue and replica.ongoing < pool.stage.max_ongoing_requests:
            self.assign(replica, pool.queue.popleft())
        if replica.ongoing < pool.stage.max_ongoing_requests:
            self.add_to_free(replica)

    def stop_one(self, pool: Pool) -> None:
        """One that is still starting, else the one with the least to do."""
        replica = min(pool.replicas, key=lambda each: (each.running, each.ongoing))
        pool.replicas.remove(replica)
        pool.num_running -= replica.running
        replica.draining = True
        self.take_from_free(replica)
        if not replica.ongoing:
            self.count_accelerators(-pool.stage.accelerators)

    def reconcile(self) -> None:
        """Stops what is too much, then starts what is missing as far as accelerators are free, by turns.

        A replica that finds too few free accelerators waits and reserves none.
        """
        for pool in self.pools:
            while len(pool.replicas) > pool.target:
                self.stop_one(pool)
        missing = [pool for pool in self.pools if len(pool.replicas) < pool.target]
        while missing:
            pool = missing.pop(0)
            if self.occupied + pool.stage.accelerators > self.num_accelerators:
                continue
            self.count_accelerators(pool.stage.accelerators)
            self.num_starts += 1
            replica = Replica(pool)
            pool.replicas.append(replica)
            self.at(self.now + pool.stage.start_s, self.serve, replica)
            if len(pool.replicas) < pool.target:
                missing.append(pool)

    # -- the controller ---------------------------------------------------------------------------------------

    def push(self, _: object, __: int) -> None:
        for pool in self.pools:
            self.count_ongoing(pool, 0)
            for replica in pool.busy:
                self.advance(replica)
        self.reports.append(
            Report(
                self.now,
                tuple(pool.ongoing for pool in self.pools),
                tuple(pool.ongoing_integral for pool in self.pools),
                tuple(pool.arrived for pool in self.pools),
                tuple(pool.refused for pool in self.pools),
                tuple(pool.arrived_s for pool in self.pools),
                tuple(pool.outstanding_s() for pool in self.pools),
                tuple(pool.request_s for pool in self.pools),
            )
        )
        self.at(self.now + PUSH_S, self.push)

    def control(self, _: object, __: int) -> None:
        view = View(
            self.now,
            self.reports,
            tuple(pool.num_running for pool in self.pools),
            tuple(pool.target for pool in self.pools),
        )
        for pool, target in zip(self.pools, self.policy(view), strict=True):
            pool.target = target
        self.reconcile()
        self.at(self.now + TICK_S, self.control)


def simulate(
    stages: Sequence[Stage],
    arrivals: Sequence[Arrival],
    num_accelerators: int,
    policy: Policy,
    initial: Sequence[int],
    seed: int = 0,
    refuse_late: bool = False,
) -> Outcome:
    """What becomes of `arrivals`, which are in order of time, until the last of them has ended.

    `initial` replicas of each stage run from the start. With `refuse_late` a request is refused where the ingress
    predicts a latency near its SLO. Raises ValueError if the replicas do not fit.
    """
    occupied = sum(stage.accelerators * count for stage, count in zip(stages, initial, strict=True))
    if occupied > num_accelerators or min(initial) < 1:
        raise ValueError(
            f"initial replicas {tuple(initial)} must be at least 1 each and fit into {num_accelerators} accelerators"
        )
    if any(later.time_s < earlier.time_s for earlier, later in pairwise(arrivals)):
        raise ValueError("arrivals must be in order of time")
    cluster = Cluster(stages, num_accelerators, policy, initial, seed, refuse_late)
    cluster.push(None, 0)
    cluster.at(TICK_S, cluster.control)
    events, coming = cluster.events, iter(arrivals)
    arrival = next(coming, None)
    while arrival is not None or cluster.in_flight:
        if arrival is not None and arrival.time_s <= events[0][0]:
            cluster.now = arrival.time_s
            cluster.arrive(arrival.kind)
            arrival = next(coming, None)
        else:
            cluster.now, _, function, subject, generation = heapq.heappop(events)
            function(subject, generation)
    cluster.count_accelerators(0)
    cluster.outcome.ended_s, cluster.outcome.num_starts = cluster.now, cluster.num_starts
    return cluster.outcome
