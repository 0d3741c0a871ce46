"""The deployments of the stages: their names, their options, and the handles that they are bound to."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from deployments.model import ModelArgs
from deployments.replicas.table import REPLICAS, STAGE_REPLICA, bind_stages
from serve_app.app import PLACEMENTS

MODEL = ModelArgs(path="checkpoints/none", name="none")
# name -> stages, ongoing requests, seconds between health checks, seconds of draining
OPTIONS = {
    "Encoder": (("encoder",), 32, 2, 20),
    "Denoiser": (("denoiser",), 16, 2, 10),
    "VAE": (("vae",), 32, 2, 20),
    "EncoderVAE": (("encoder", "vae"), 32, 2, 20),
    "Pipeline": (("encoder", "denoiser", "vae"), 16, 2, 10),
}


def deployments_of(placement: str) -> list[Any]:
    return [application._bound_deployment for application in bind_stages(MODEL, PLACEMENTS[placement])]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_deployment_is_the_one_class_with_the_options_of_its_row(placement: str) -> None:
    for deployment in deployments_of(placement):
        model, stages, _ = deployment.init_args
        config = deployment._deployment_config
        assert deployment.func_or_class == STAGE_REPLICA
        assert model == MODEL
        assert OPTIONS[deployment.name] == (
            stages,
            deployment.max_ongoing_requests,
            config.health_check_period_s,
            config.graceful_shutdown_timeout_s,
        )


def test_the_one_class_is_found_by_its_path() -> None:
    module, name = STAGE_REPLICA.rsplit(".", 1)
    assert getattr(import_module(module), name).__doc__.startswith("Does the work of one, two or all of the stages")


def test_every_row_is_of_a_placement() -> None:
    assert set(REPLICAS) == set(OPTIONS) == {name for names in PLACEMENTS.values() for name in names}


@pytest.mark.parametrize("names", PLACEMENTS.values())
def test_a_placement_runs_every_stage_where_its_place_says(names: tuple[str, str, str]) -> None:
    for stage, name in zip(("encoder", "denoiser", "vae"), names, strict=True):
        assert stage in REPLICAS[name].stages


@pytest.mark.parametrize("placement", ["three_stage", "two_stage"])
def test_a_denoiser_is_bound_to_the_very_deployments_of_the_other_stages(placement: str) -> None:
    encoder, denoiser, vae = bind_stages(MODEL, PLACEMENTS[placement])
    _, _, others = denoiser._bound_deployment.init_args
    assert others == {"encoder": encoder, "vae": vae}
    assert encoder._bound_deployment.init_args[2] == {}


def test_a_vae_that_is_to_warm_up_asks_the_encoder() -> None:
    model = MODEL.model_copy(update={"warm_up": ({"num_inference_steps": 2},)})
    encoder, _, vae = bind_stages(model, PLACEMENTS["three_stage"])
    assert vae._bound_deployment.init_args[2] == {"encoder": encoder}
    _, _, vae = bind_stages(MODEL, PLACEMENTS["three_stage"])
    assert vae._bound_deployment.init_args[2] == {}


def test_a_pipeline_is_one_application_bound_to_nothing() -> None:
    encoder, denoiser, vae = bind_stages(MODEL, PLACEMENTS["one_stage"])
    assert encoder is denoiser is vae
    assert encoder._bound_deployment.init_args[2] == {}


def test_further_options_come_on_top_of_the_rows_own() -> None:
    options = {"Denoiser": {"num_replicas": 2, "ray_actor_options": {"num_gpus": 0.5}}}
    encoder, denoiser, _ = bind_stages(MODEL, PLACEMENTS["three_stage"], options)
    assert (denoiser._bound_deployment.num_replicas, encoder._bound_deployment.num_replicas) == (2, 1)
    assert denoiser._bound_deployment.ray_actor_options["num_gpus"] == 0.5
    assert denoiser._bound_deployment.max_ongoing_requests == 16


def test_serve_builds_one_deployment_for_each_name_and_hands_the_denoiser_its_handles() -> None:
    _, denoiser, _ = bind_stages(MODEL, PLACEMENTS["three_stage"])
    built = build_app(denoiser, name="app", make_deployment_handle=lambda deployment, app: f"{app}:{deployment.name}")
    by_name = {deployment.name: deployment for deployment in built.deployments}
    assert set(by_name) == {"Encoder", "Denoiser", "VAE"}
    assert by_name["Denoiser"].init_args[2] == {"encoder": "app:Encoder", "vae": "app:VAE"}
    assert all(deployment.func_or_class == STAGE_REPLICA for deployment in built.deployments)


@pytest.mark.parametrize(
    ("placement", "processes"),
    [
        ("three_stage", (("encoder",), ("denoiser",), ("vae",))),
        ("two_stage", (("encoder", "vae"), ("denoiser",))),
        ("one_stage", (("encoder", "denoiser", "vae"),)),
    ],
)
def test_the_replicas_that_denoise_are_told_what_to_check(placement: str, processes: Any) -> None:
    for verify in (False, True):
        for application in bind_stages(MODEL, PLACEMENTS[placement], verify=verify):
            bound = application._bound_deployment
            checked = processes if verify and bound.name in ("Denoiser", "Pipeline") else ()
            assert bound.init_kwargs == {"checked": checked}
