"""The deployment `Ingress`: Serve's shell round the HTTP application, which each replica makes from its Service."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments import tracing
from deployments.metrics.serve_meter import ServeMeter
from deployments.observability.logging_setup import apply_logging_level
from env_config.library_caches import check_cache_root
from env_config.variables import EnvConfig
from serve_app.http.app import http_app
from serve_app.http.middleware.limits import SERVE_MAX_ONGOING_REQUESTS
from serve_app.making.sleep.deployment_states import DeploymentStates
from serve_app.making.sleep.kept_facts import FactStore
from serve_app.making.sleep.model_sleep import ModelSleep
from serve_app.making.stages import Stages
from serve_app.service import ServiceArgs, open_service

MORE_THAN_THE_QUEUE_S = 300.0  # stages that are replaced too, such as at a change of their arguments, load meanwhile


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=SERVE_MAX_ONGOING_REQUESTS,
    health_check_period_s=2,
    max_surge_percent=100,  # at an update the new replica serves before the old one is drained
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Ingress:
    """One replica of the ingress: it runs no model. It does not start where it cannot store outputs, or spool them."""

    docs_path = "/docs"  # where Serve's status page finds the routes

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        args: ServiceArgs,
        models: Mapping[str, tuple[DeploymentHandle, DeploymentHandle, DeploymentHandle]],
        versions: Mapping[str, str],
    ) -> None:
        """`models`: the encoder, the denoiser and the VAE of each, by its name; `versions`: of their arguments."""
        env = EnvConfig.from_environ()
        check_cache_root(env.runtime.cache_root)
        apply_logging_level(env.runtime.logging_level)
        tracing.start(serve.get_replica_context().replica_id.unique_id)
        owner = ray.get_runtime_context().get_actor_name() or ""
        meter = ServeMeter()
        stages = {
            name: Stages(*handles, owner, meter=meter, version=versions[name]) for name, handles in models.items()
        }
        application = serve.get_replica_context().app_name
        states = DeploymentStates(application)
        for name, each in stages.items():
            store = FactStore(application, name)
            each.sleep = ModelSleep(each.deployments(), states, store, name, meter)
        self.service = await open_service(args, env, stages, application)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called after the constructor. The service starts last: a replica that cannot answer runs no jobs."""
        app = http_app(self.service)
        self.service.start()
        return app

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped: its jobs go to others at once, its spans that wait are sent."""
        if hasattr(self, "service"):
            self.service.close()
        tracing.stop()


def draining_s(args: ServiceArgs) -> float:
    """How long a replica that is to go answers what it has let in, before Serve ends it; one that is idle goes at once.

    As long as the last of a full queue takes, by prediction, and the start of new replicas of the stages.
    """
    return max(model.admission.max_queue_s for model in args.served.values()) + MORE_THAN_THE_QUEUE_S
