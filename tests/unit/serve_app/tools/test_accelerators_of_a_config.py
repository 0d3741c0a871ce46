"""A config whose replicas would find no accelerator, or more than they can use, is refused before it is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.tools.check_config import check_config

VARIABLE = "SGLANG_DIFFUSION_TARGET_DEVICE"
NEEDED = "so it must be above 0 and at most 1 (below 1 where replicas share one)"


def problems_of(
    options: dict[str, dict[str, Any]], tmp_path: Path, device: str | None = "cuda", placement: str = "two_stage"
) -> list[str]:
    """Of a config with these `ray_actor_options` by deployment."""
    file = tmp_path / "serve.yaml"
    application = {
        "name": "app",
        "route_prefix": "/",
        "import_path": "serve_app.app:build_app",
        "args": {"model": "checkpoints/emoji-flux", "placement": placement},
        "runtime_env": {"env_vars": {} if device is None else {VARIABLE: device}},
        "deployments": [{"name": name, "ray_actor_options": each} for name, each in options.items()],
    }
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    return [problem.removeprefix(f"{file}: applications[app].deployments") for problem in check_config(file)]


def test_shares_of_one_gpu_are_all_right(tmp_path: Path) -> None:
    assert problems_of({"EncoderVAE": {"num_gpus": 0.3}, "Denoiser": {"num_gpus": 0.7}}, tmp_path) == []


def test_a_deployment_without_a_gpu_is_refused_whether_it_is_written_or_not(tmp_path: Path) -> None:
    missing = f"ray_actor_options.num_gpus is 0: with {VARIABLE}=cuda a replica computes on one GPU, {NEEDED}"
    problems = problems_of({"Denoiser": {"num_cpus": 1}}, tmp_path)
    assert [problem.split(", and without")[0] for problem in problems] == [
        f"[EncoderVAE].{missing}",
        f"[Denoiser].{missing}",
    ]


def test_two_gpus_for_one_replica_are_refused(tmp_path: Path) -> None:
    [problem] = problems_of({"Pipeline": {"num_gpus": 2}}, tmp_path, placement="one_stage")
    assert problem.startswith("[Pipeline].ray_actor_options.num_gpus is 2: ")


def test_an_npu_is_asked_for_among_the_resources(tmp_path: Path) -> None:
    assert problems_of({"Pipeline": {"resources": {"NPU": 1}}}, tmp_path, "npu", "one_stage") == []
    [problem] = problems_of({"Pipeline": {"num_gpus": 1}}, tmp_path, "npu", "one_stage")
    assert problem.startswith("[Pipeline].ray_actor_options.resources.NPU is 0: ")


def test_a_deployment_may_run_elsewhere_than_its_application(tmp_path: Path) -> None:
    on_cpu = {"runtime_env": {"env_vars": {VARIABLE: "cpu"}}}
    assert problems_of({"EncoderVAE": on_cpu, "Denoiser": {"num_gpus": 1}}, tmp_path) == []
    assert problems_of({}, tmp_path, "cpu") == []


def test_what_only_the_node_knows_is_left_to_the_replica(tmp_path: Path) -> None:
    assert problems_of({}, tmp_path, "${DEVICE}") == []


def test_a_device_that_ray_was_started_with_counts_where_the_config_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "cpu")
    assert problems_of({}, tmp_path, None) == []
    monkeypatch.delenv(VARIABLE)
    assert len(problems_of({}, tmp_path, None)) == 2, "cuda is the variable's default"
