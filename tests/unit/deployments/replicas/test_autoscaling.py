"""What a replica reports of its load: the keys that the policy reads, and a denoiser's outstanding seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.messages import StageName
from deployments.observability.stage_load import Load
from deployments.replicas.autoscaling import autoscaling_stats, denoising_outstanding_s


def load(**fields: Any) -> Load:
    usual = {"busy_s": 10.0, "outstanding_s": 4.0, "request_s": 2.0, "arrived": 6, "present": 3, "refused": 1}
    return Load(**(usual | fields))


def engine(remaining_s: list[float], seconds: float) -> Any:
    return SimpleNamespace(remaining_s=lambda: remaining_s, statistics=SimpleNamespace(seconds=seconds))


def test_the_keys_are_the_fields_of_a_load_under_the_names_of_the_stages_and_the_seconds_of_the_start() -> None:
    loads: dict[StageName, Load] = {"encoder": load(), "vae": load(busy_s=7.0)}
    stats = autoscaling_stats(loads, None, load_s=31.0)
    fields = ("busy_s", "outstanding_s", "request_s", "arrived", "present", "refused")
    assert list(stats) == [*(f"{stage}_{name}" for stage in ("encoder", "vae") for name in fields), "load_s"]
    assert stats["load_s"] == 31.0
    assert (stats["encoder_outstanding_s"], stats["vae_busy_s"], stats["vae_refused"]) == (4.0, 7.0, 1)


def test_a_denoisers_outstanding_seconds_are_those_of_its_engine() -> None:
    stats = autoscaling_stats({"denoiser": load(present=2)}, engine([1.0, 2.0], seconds=10.0), load_s=31.0)
    assert stats["denoiser_outstanding_s"] == pytest.approx(3.0)
    assert stats["denoiser_request_s"] == 2.0


def test_forwards_are_predicted_with_the_work_between_them() -> None:
    assert denoising_outstanding_s(load(busy_s=10.0, present=1), engine([3.0], seconds=5.0)) == pytest.approx(6.0)


def test_requests_that_the_engine_does_not_know_yet_count_like_others() -> None:
    assert denoising_outstanding_s(load(present=3), engine([1.0], seconds=10.0)) == pytest.approx(1.0 + 2 * 2.0)


def test_before_the_first_request_has_ended_the_forwards_count_alone() -> None:
    first = load(request_s=0.0, present=2)
    assert denoising_outstanding_s(first, engine([1.5], seconds=0.0)) == pytest.approx(1.5)
