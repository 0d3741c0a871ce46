"""What the ingress knows of a request's way through the stages, as metrics of Ray Serve (Prometheus)."""

from dataclasses import dataclass
from functools import cache

from ray.serve.metrics import Counter


@dataclass(frozen=True)
class GenerationMetrics:
    """The counters of this process."""

    attempts: Counter  # ways through the stages that were begun
    recoveries: Counter  # of requests, after the death of a replica
    lost_steps: Counter  # denoising steps that had been seen and were done again
    given_up: Counter  # requests that were failed as poison


@cache
def generation_metrics() -> GenerationMetrics:
    """Made at the first request: metrics take the tags of the replica that makes them."""
    return GenerationMetrics(
        attempts=Counter("triptych_attempts", "Ways through the stages that were begun."),
        recoveries=Counter("triptych_recoveries", "Requests that went on after the death of a replica."),
        lost_steps=Counter("triptych_lost_steps", "Denoising steps done again after the death of a replica."),
        given_up=Counter("triptych_given_up", "Requests failed because their replicas died again and again."),
    )
