"""Which replica a request with LoRAs goes to: one that holds them already, where none has less to do.

Serve's multiplexed model ids know one id for each request, and keep it waiting for a busy holder for a second. This is
a request router of our own: the replicas' `record_routing_stats` tells it what they hold.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RunningReplica

from deployments.adapters.use import FEATURE
from deployments.messages import GenerationRequest

HELD = "adapters"  # in the routing stats: digests
STATS_PERIOD_S = 2.0

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True)
class Candidate(Generic[Id]):
    """A replica, as the process that asks knows it."""

    id: Id
    ongoing: int | None  # requests that it has; None: it did not say
    held: frozenset[str]  # digests of LoRAs


def best_holders(candidates: Sequence[Candidate[Id]], wanted: frozenset[str]) -> list[Id]:
    """Of the replicas that have least to do, those that hold most of what is wanted; none where that is nothing."""
    known = [each.ongoing for each in candidates if each.ongoing is not None]
    if not known:
        return []
    least = [each for each in candidates if each.ongoing == min(known)]
    most = max(len(each.held & wanted) for each in least)
    return [each.id for each in least if len(each.held & wanted) == most] if most else []


def wanted_by(arguments: Sequence[Any]) -> frozenset[str]:
    """The digests of the LoRAs that a call of a stage needs, as far as they are known."""
    request = arguments[0] if arguments else None
    if not isinstance(request, GenerationRequest):
        return frozenset()
    return frozenset(plain["digest"] for plain in request.features.get(FEATURE, ()) if plain["digest"])


class HoldersFirst(PowerOfTwoChoicesRequestRouter):
    """Serve's own router for all calls but those of requests with LoRAs."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best holders first, if there are any; then what Serve's own router would choose."""
        others: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        wanted = wanted_by(pending_request.args) if pending_request is not None else frozenset[str]()
        if not wanted or not any(wanted & held_by(each) for each in candidate_replicas):
            return others
        # Not Serve's cache of them, which does not see that requests end.
        probed = await self._probe_queue_lens(candidate_replicas, 0)
        candidates = [Candidate(each, ongoing, held_by(each)) for each, ongoing in probed]
        best = best_holders(candidates, wanted)
        return [best, *others] if best else others


def held_by(replica: RunningReplica) -> frozenset[str]:
    return frozenset(replica.routing_stats.get(HELD, ()))


def holders_first() -> RequestRouterConfig:
    """For the options of a deployment."""
    return RequestRouterConfig(
        request_router_class=f"{HoldersFirst.__module__}:{HoldersFirst.__name__}",
        request_routing_stats_period_s=STATS_PERIOD_S,
    )
