"""What cannot be had with ranks is refused at the start, by name and with what can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from deployments.devices import Device
from deployments.memory.args import VAEArgs
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.one_process.pipeline import WholePipeline
from deployments.ranks.args import ParallelArgs
from deployments.ranks.splits import check_splits
from deployments.replicas.ranks import SERVES, asked_ranks, start_ranks
from deployments.stages.build import build_stage
from deployments.stages.ranks.beside import features_beside
from env_config.variables import EnvConfig

CPU = torch.device("cpu")
RANKS = ParallelArgs(ulysses=2)


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )


@pytest.mark.parametrize(
    ("model", "parallel", "reason"),
    [
        (
            "unet",
            {"ulysses": 2},
            "UNet2DConditionModel has no plan for it .*or in cache-dit. Here can be had: batch$",
        ),
        ("unet", {"ring": 2}, "parallel.ring: 2 is not possible for unet: .* has no plan"),
        ("unet", {"tensor": 2}, "parallel.tensor: 2 is not possible for unet: .* has no plan"),
        ("flux", {"ulysses": 3}, "3 does not divide the 2 attention heads"),
        ("flux", {"ring": 2}, "'native', which does not return the log-sum-exp that ring needs: take ulysses"),
        ("flux", {"tensor": 2}, "diffusers splits weights on cuda, .* not on cpu. Here can be had: ulysses, batch$"),
    ],
)
def test_a_way_that_a_model_does_not_have_is_refused_with_those_that_it_has(
    model: str, parallel: dict[str, int], reason: str, request: pytest.FixtureRequest
) -> None:
    modules = {model: request.getfixturevalue(model)}
    with pytest.raises(AccelerationError, match=reason):
        check_splits(modules, ParallelArgs(**parallel), CPU)


def test_a_plan_that_names_what_a_model_does_not_have_is_refused(
    flux: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux, "_cp_plan", {**flux._cp_plan, "layers.0": {}})
    with pytest.raises(
        AccelerationError, match="plan of FluxTransformer2DModel in diffusers does not fit it: 'layers'"
    ):
        check_splits({"transformer": flux}, RANKS, CPU)


def test_every_model_has_batch(flux: torch.nn.Module, unet: torch.nn.Module) -> None:
    check_splits({"flux": flux, "unet": unet}, ParallelArgs(batch=2), CPU)
    check_splits({"flux": flux}, ParallelArgs(batch=2, ulysses=2), CPU)


def test_one_model_without_the_way_is_enough_to_refuse(flux: torch.nn.Module, unet: torch.nn.Module) -> None:
    with pytest.raises(AccelerationError, match="for controlnet: UNet2DConditionModel has no plan"):
        check_splits({"transformer": flux, "controlnet": unet}, ParallelArgs(ulysses=2), CPU)


@pytest.mark.parametrize(
    ("model", "variables", "reason"),
    [
        ({"compile": "regional"}, {}, "compile: transformer: regional; off is allowed"),
        ({"offload": {"transformer": "model"}}, {}, "offload.transformer; leave it out: encoders are allowed"),
        ({}, {"SGLANG_CACHE_DIT_ENABLED": "true"}, "cache_dit by its variables; set them off"),
    ],
)
def test_what_cannot_be_had_beside_ranks_is_refused_by_name(
    model: dict[str, Any], variables: dict[str, str], reason: str, flux_checkpoint: Path
) -> None:
    args = ModelArgs(path=str(flux_checkpoint), name="flux", parallel=RANKS, **model)
    with pytest.raises(AccelerationError, match=f"with `parallel` this is not possible: {reason}"):
        build_stage(args, ("denoiser",), EnvConfig.from_environ(variables), Device("cpu", CPU))


@pytest.mark.parametrize(("parallel", "asked_for"), [(RANKS, {"loras"}), (ParallelArgs(tensor=2), set())])
def test_what_requests_may_add_is_told_without_what_they_may_not(
    parallel: ParallelArgs, asked_for: set[str], flux_checkpoint: Path
) -> None:
    args = ModelArgs(path=str(flux_checkpoint), name="flux", parallel=parallel)
    assert {feature.name for feature in features_beside(args) if feature.is_asked_for} == asked_for
    stage = build_stage(args, ("encoder",), EnvConfig(), Device("cpu", CPU))
    assert (stage.adapters.why_none() is None) == bool(asked_for)


def test_loras_are_refused_beside_split_weights(flux_checkpoint: Path) -> None:
    adapters = {"ink": {"path": "/nowhere/ink.safetensors"}}
    args = ModelArgs(path=str(flux_checkpoint), name="flux", parallel=ParallelArgs(tensor=2), adapters=adapters)
    with pytest.raises(AccelerationError, match="not possible: adapters: ink beside tensor: 2; leave either out"):
        build_stage(args, ("denoiser",), EnvConfig(), Device("cpu", CPU))


TILES = VAEArgs.model_validate({"tiling": "on", "parallel": 3})


@pytest.mark.parametrize(("setting", "asked"), [("parallel", {"parallel": RANKS}), (r"vae\.parallel", {"vae": TILES})])
def test_one_process_has_no_ranks(setting: str, asked: dict[str, Any], flux_checkpoint: Path) -> None:
    args = ModelArgs(path=str(flux_checkpoint), name="flux", **asked)
    with pytest.raises(AccelerationError, match=f"^{setting}: ranks are processes of their own, which an application"):
        WholePipeline(args, EnvConfig())


def test_a_replica_has_the_ranks_of_its_own_stages() -> None:
    model = ModelArgs(path="m", name="m", parallel=RANKS, vae=TILES)
    assert asked_ranks(model, ("encoder",)) == []
    [denoiser] = asked_ranks(model, ("denoiser",))
    assert (denoiser.setting, denoiser.stage, denoiser.args.size) == ("parallel", "denoiser", 2)
    [vae] = asked_ranks(model, ("encoder", "vae"))
    assert (vae.setting, vae.stage, vae.args.size, vae.args.ranks_of_sample) == ("vae.parallel", "vae", 3, 1)
    with pytest.raises(AccelerationError, match=r"parallel and vae\.parallel: a process has one group of ranks"):
        start_ranks(model, "cpu", ("denoiser", "vae"))
    assert set(SERVES) == {denoiser.stage, vae.stage}
