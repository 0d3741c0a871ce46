"""The policy scales a real application: each deployment by its own work."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.served_application import ServedApplication

pytestmark = [pytest.mark.timeout(600), pytest.mark.rest]


def test_work_for_the_denoiser_starts_a_second_one_which_goes_again_and_no_request_is_lost(
    variants: ServedApplication,
) -> None:
    for seed in range(5):  # the first of a replica takes longer than any other
        variants.pictures("/two_stage", prompt="a small cat", seed=seed, num_inference_steps=2)
    answers: list[Future[list[dict[str, Any]]]] = []
    seen: set[tuple[int, int]] = set()  # (replicas of EncoderVAE, of Denoiser)

    def observe(*, until: tuple[int, int], at_once: int, steps: int) -> None:
        """Keeps so many requests under way until there are these replicas."""
        give_up = time.monotonic() + 240
        while (now := (num_replicas(variants, "EncoderVAE"), num_replicas(variants, "Denoiser"))) != until:
            seen.add(now)
            assert time.monotonic() < give_up, f"{now} replicas, wanted {until}"
            while sum(not answer.done() for answer in answers) < at_once:
                arguments = {"prompt": "a small cat", "seed": len(answers), "num_inference_steps": steps}
                answers.append(callers.submit(variants.pictures, "/two_stage", **arguments))
            time.sleep(0.2)
        seen.add(now)

    with ThreadPoolExecutor(8) as callers:
        observe(until=(1, 2), at_once=8, steps=300)
        observe(until=(1, 1), at_once=1, steps=2)  # fewer, and while there are some the second denoiser is taken away

    assert all(len(answer.result()) == 1 for answer in answers)
    assert {(1, 1), (1, 2)} <= seen
    assert all(ends <= denoisers for ends, denoisers in seen), f"{seen}: the encoder and the VAE had less to do"


def num_replicas(served: ServedApplication, deployment: str) -> int:
    """Those that run or start; what is being drained is not among them."""
    applications = httpx.get(f"{served.dashboard()}/api/serve/applications/", timeout=60).json()["applications"]
    replicas = applications["two_stage"]["deployments"][deployment]["replicas"]
    return sum(replica["state"] != "STOPPING" for replica in replicas)
