"""Nothing accepted is lost: five kills under load, of pictures and of videos made by two transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
import ray

from deployments.messages import GenerationRequest
from deployments.replicas.owner_watch import CHECK_EVERY_S
from serve_app.making.generate import generate
from tests.support.kills import PATIENCE_S, SIZES, Application, check_kills, stages_of
from tests.support.served_application import ServedApplication

# Ray warns of its own affairs (sockets, forks) in a process that joins it.
pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

ENDLESS = {"prompt": "a cat", "num_inference_steps": 200_000, **SIZES["flux"]}


def test_no_request_is_lost_or_changed_by_kills(
    wan: ServedApplication, metrics_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = check_kills(applications(), 1, metrics_port)
    with capsys.disabled():
        print("\n" + "\n".join(figures))
    wan.wait_until_healthy()
    wan.wait_until_healthy("/wan")


def applications() -> list[Application]:
    return [Application("flux", stages_of("triptych")), Application("wan22", stages_of("wan"))]


@pytest.mark.rest
def test_a_denoising_ends_when_the_actor_that_asked_for_it_dies(served: ServedApplication, metrics_port: int) -> None:
    application = Application("flux", stages_of("triptych"))
    caller = Caller.options(name="caller", namespace="serve", num_cpus=0).remote()  # type: ignore[attr-defined]
    caller.ask.remote("triptych", dataclasses.replace(application.request(1, 0), arguments=ENDLESS))
    wait_for_jobs(application, 1)
    time.sleep(4 * CHECK_EVERY_S)
    wait_for_jobs(application, 1)  # who lives is left alone
    ray.kill(caller)
    wait_for_jobs(application, 0)


@ray.remote
class Caller:
    """In the place of an ingress."""

    async def ask(self, name: str, request: GenerationRequest) -> None:
        await generate(stages_of(name, ray.get_runtime_context().get_actor_name()), request)


def wait_for_jobs(application: Application, number: int) -> None:
    """Until the denoiser has so many."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        described = asyncio.run(inspected(application))
        if len(described["requests"]) == number:
            return
        assert time.monotonic() < give_up, described
        time.sleep(0.5)


async def inspected(application: Application) -> dict[str, Any]:
    answer: dict[str, Any] = await application.stages.denoiser.inspect.remote()
    return answer
