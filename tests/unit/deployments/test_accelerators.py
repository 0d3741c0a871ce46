"""A replica on an accelerator needs a share of one from Ray: none, or more than one, is refused by the field."""

from __future__ import annotations

import pytest

from deployments.accelerators import ACCELERATORS, assigned_share, share_problem
from env_config.variables import EnvConfig

COUNTED = ("cuda", "rocm", "xpu", "npu", "musa")


def test_ray_counts_the_devices_that_several_actors_of_a_node_may_have() -> None:
    assert tuple(ACCELERATORS) == COUNTED
    for name in (*COUNTED, "mps", "cpu"):
        assert EnvConfig.parse({"SGLANG_DIFFUSION_TARGET_DEVICE": name}).runtime.target_device == name


@pytest.mark.parametrize("target", COUNTED)
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_a_share_or_a_whole_device_is_what_a_replica_needs(target: str, share: float) -> None:
    assert share_problem(target, share) is None


@pytest.mark.parametrize("target", COUNTED)
@pytest.mark.parametrize("share", [0, 2, 4])
def test_none_and_more_than_one_are_refused_with_field_value_and_what_is_allowed(target: str, share: float) -> None:
    problem = share_problem(target, share)
    assert problem is not None
    assert problem.startswith(f"{ACCELERATORS[target].field} is {share}: ")
    assert f"SGLANG_DIFFUSION_TARGET_DEVICE={target}" in problem
    assert "above 0 and at most 1" in problem


@pytest.mark.parametrize("target", ["cpu", "mps"])
def test_a_device_that_ray_does_not_count_needs_nothing_from_it(target: str) -> None:
    assert assigned_share(target, {"CPU": 1.0}) is None
    assert share_problem(target, 0) is None


def test_the_share_is_read_from_what_ray_assigned() -> None:
    assert assigned_share("cuda", {"CPU": 1.0}) == 0.0
    assert assigned_share("rocm", {"CPU": 1.0, "GPU": 0.3}) == 0.3
    assert assigned_share("npu", {"GPU": 1.0, "NPU": 2.0}) == 2.0


def test_the_options_of_a_deployment_ask_in_their_own_field() -> None:
    assert ACCELERATORS["cuda"].asked({"num_gpus": 0.7}) == 0.7
    assert ACCELERATORS["npu"].asked({"num_gpus": 1, "resources": {"NPU": 1}}) == 1
    assert ACCELERATORS["npu"].asked({"num_gpus": 1}) == 0
    assert ACCELERATORS["cuda"].asked({"num_gpus": None}) == 0
