"""How the stress tests of a cluster deploy two models, and who asks them."""

from __future__ import annotations

from typing import Any

from tests.support.autoscaled_cluster import HEAD, MOST_NODES, PLACE
from tests.support.cluster_load import Caller

ALTERNATE_S = 300
ON_HEAD = {"num_cpus": 0.1, "resources": {HEAD: 0.01}}
POLICY = {
    "policy_function": "serve_app.autoscaling:ReplicaRatio",
    "policy_kwargs": {"target_queue_s": 5, "cooldown_s": 15},
}
GROWS = {"min_replicas": 1, "max_replicas": MOST_NODES, "upscale_delay_s": 0, "downscale_delay_s": 0}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "Ingress": {"ray_actor_options": ON_HEAD},
    "EncoderVAE-flux": {"ray_actor_options": ON_HEAD},
    "Pipeline-wan": {"ray_actor_options": ON_HEAD},
    "Denoiser-flux": {
        "ray_actor_options": {"num_cpus": 0.1, "resources": {PLACE: 1}},
        "max_ongoing_requests": 3,
        "autoscaling_config": GROWS,
    },
}
CALLERS = (
    *(Caller("job", "flux", seed) for seed in range(1, 4)),
    *(Caller("call", "flux", seed) for seed in range(11, 13)),
    Caller("job", "wan", 1),
)
