"""Other applications beside the first: its model in two stages and in one, and two that cannot start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.s3_server import S3Server
from tests.support.served_application import ONE_STAGE, TWO_STAGE, ServedApplication, application
from tests.support.served_fixtures import s3_variables


@pytest.fixture(scope="package")
def variants(served: ServedApplication, flux_checkpoint: Path, s3: S3Server) -> Iterator[ServedApplication]:
    """/two_stage stores in S3 and is scaled by the policy, /one_stage has a short queue."""
    one_stage = application(
        "one_stage",
        flux_checkpoint,
        ONE_STAGE,
        served.folder,
        placement="one_stage",
        admission={"max_queue_s": 2},
    )
    with served.beside(two_stage(served, flux_checkpoint, s3), one_stage, *failing(served, flux_checkpoint, s3)):
        served.wait_until_healthy("/two_stage")
        served.wait_until_healthy("/one_stage")
        yield served


def two_stage(served: ServedApplication, checkpoint: Path, s3: S3Server) -> dict[str, Any]:
    """The policy may scale each of its two deployments to two replicas."""
    config = application("two_stage", checkpoint, TWO_STAGE, served.folder, s3_variables(s3), placement="two_stage")
    config["autoscaling_policy"] = {
        "policy_function": "serve_app.autoscaling:ReplicaRatio",
        "policy_kwargs": {"cooldown_s": 4, "target_queue_s": 6},
    }
    for deployment in config["deployments"][1:]:  # without the ingress
        deployment["graceful_shutdown_timeout_s"] = 60  # what the second denoiser has begun it ends
        deployment["autoscaling_config"] = {
            "max_replicas": 2,
            "target_ongoing_requests": 100,  # Serve's own numbers would ask for one replica
            "metrics_interval_s": 1,
            "look_back_period_s": 5,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
        }
    return config


def failing(served: ServedApplication, checkpoint: Path, s3: S3Server) -> Iterator[dict[str, Any]]:
    """Two with a mistake in their environment; Serve tries each once."""
    mistakes = {
        "no_bucket": s3_variables(s3, "no-such-bucket"),
        "no_device": {"SGLANG_DIFFUSION_TARGET_DEVICE": "npu"},
    }
    for name, variables in mistakes.items():
        config = application(name, checkpoint, ONE_STAGE, served.folder, variables, placement="one_stage")
        config["deployments"] = [
            {**deployment, "max_constructor_retry_count": 1} for deployment in config["deployments"]
        ]
        yield config
