"""How the stress tests of a cluster deploy two models, with S3 and PostgreSQL beside them, and who asks them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.support.autoscaled_cluster import HEAD, MOST_NODES, PLACE
from tests.support.cluster_load import Caller
from tests.support.postgresql import installed_programs, postgresql_server
from tests.support.s3_server import s3_server
from tests.support.served_application import ROOT

TWO_MODELS: dict[str, Any] = {
    "models": {
        "flux": {
            "model": str(ROOT / "checkpoints/emoji-flux"),
            "placement": "two_stage",
            "limits": {"max_steps": 1000},
        },
        "wan": {"model": str(ROOT / "checkpoints/emoji-wan"), "placement": "one_stage", "limits": {"max_steps": 1000}},
    },
}
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


@contextmanager
def stores() -> Iterator[dict[str, Any]]:
    """What an application has that keeps its media in S3 and its jobs in PostgreSQL. Raises RuntimeError without it."""
    programs = installed_programs()
    if programs is None:
        raise RuntimeError("it needs an installed PostgreSQL (Debian: postgresql)")
    with ExitStack() as cleaning:
        s3 = cleaning.enter_context(s3_server())
        postgresql = cleaning.enter_context(postgresql_server(programs))
        yield {
            "import_path": "serve_app.app:build_app",
            "runtime_env": {
                "env_vars": {
                    "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu",
                    "SGLANG_DIFFUSION_CACHE_ROOT": cleaning.enter_context(tempfile.TemporaryDirectory()),
                    "SGLANG_CLOUD_STORAGE_TYPE": "s3",
                    "SGLANG_S3_BUCKET_NAME": s3.create_bucket("outputs"),
                    "SGLANG_S3_ENDPOINT_URL": s3.endpoint,
                    "SGLANG_S3_ACCESS_KEY_ID": s3.access_key,
                    "SGLANG_S3_SECRET_ACCESS_KEY": s3.secret_key,
                }
            },
            "args": {"jobs": {"lease_s": 5, "store_url": postgresql.create_database("jobs")}},
        }


def next_version(checkpoint: str, folder: Path) -> Path:
    """Of a FLUX: another text encoder beside the same transformer and VAE."""
    shutil.copytree(checkpoint, folder)
    file = folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.final_layer_norm.weight"] *= 1.5
    save_file(weights, file, metadata={"format": "pt"})
    return folder
