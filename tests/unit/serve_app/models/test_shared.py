"""`share`: which deployments do their stage for several models, by name or by what their checkpoints have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.build_app import build_app as serve_build_app
from safetensors.numpy import save_file

from deployments.plan.budget import Demand
from serve_app.app import AppArgs, build_app, deployments_of, model_args, shared_deployments
from serve_app.models.shared import held_before
from serve_app.tools.check_config import check_config, deployment_names
from serve_app.tools.fits import each_process_once

THREE: dict[str, Any] = {name: {"model": f"o/{name}"} for name in ("flux", "chroma", "sd3")}
ONE_STAGE = {"model": "o/wan", "placement": "one_stage"}
CLASSES = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
FILES = {"transformers": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


def checkpoint(folder: Path, **numbers: float) -> dict[str, Any]:
    """The entry of a model whose components are as large as their `numbers` say; without one: of no weights."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ChromaPipeline", **CLASSES}))
    for name, (library, _) in CLASSES.items():
        (folder / name).mkdir()
        if name in numbers:
            (folder / name / "config.json").write_text("{}")
            save_file({"w": np.full(4, numbers[name], np.float32)}, folder / name / FILES[library])
    return {"model": str(folder)}


def test_a_named_deployment_is_that_of_all_its_models_and_the_others_stay() -> None:
    args = AppArgs(models=THREE, share=["Encoder-flux+chroma+sd3", "VAE-flux+sd3"])
    built = serve_build_app(build_app(args), name="app", make_deployment_handle=lambda each, _: each.name)
    by_name = {each.name: each for each in built.deployments}
    alone = {"Denoiser-flux", "Denoiser-chroma", "Denoiser-sd3", "VAE-chroma", "Ingress"}
    assert set(by_name) == alone | {"Encoder-flux+chroma+sd3", "VAE-flux+sd3"}
    shared = by_name["Encoder-flux+chroma+sd3"]
    models = [shared.init_args[0], *(model for model, _ in shared.init_kwargs["also"])]
    assert models == [model_args(args, name) for name in THREE]
    assert "also" not in by_name["VAE-chroma"].init_kwargs
    assert by_name["Denoiser-sd3"].init_args[2] == {"encoder": "Encoder-flux+chroma+sd3", "vae": "VAE-flux+sd3"}
    _, stages, _ = by_name["Ingress"].init_args
    assert stages["chroma"] == ("Encoder-flux+chroma+sd3", "Denoiser-chroma", "VAE-chroma")
    assert deployments_of(args, "chroma") == {
        "Encoder-flux+chroma+sd3": "Encoder", "Denoiser-chroma": "Denoiser", "VAE-chroma": "VAE"
    }  # fmt: skip


def test_a_shared_vae_that_is_to_warm_up_asks_the_encoder_of_each_of_its_models() -> None:
    warm: dict[str, Any] = {"warm_up": [{"num_inference_steps": 1}]}
    models = {name: entry | (warm if name == "sd3" else {}) for name, entry in THREE.items()}
    args = AppArgs(models=models, share=["VAE-flux+sd3"])
    built = serve_build_app(build_app(args), name="app", make_deployment_handle=lambda each, _: each.name)
    [shared] = [each for each in built.deployments if each.name == "VAE-flux+sd3"]
    [(model, handles)] = shared.init_kwargs["also"]
    assert (shared.init_args[2], model.name, handles) == ({}, "sd3", {"encoder": "Encoder-sd3"})


def test_a_stage_beside_the_vae_is_shared_too() -> None:
    models = {name: entry | {"placement": "two_stage"} for name, entry in THREE.items()}
    names = deployment_names(build_app(AppArgs(models=models, share=["EncoderVAE-flux+sd3"])))
    assert {"EncoderVAE-flux+sd3", "EncoderVAE-chroma", "Denoiser-flux"} < set(names)


def test_ranks_of_a_vae_hold_one_model() -> None:
    tiles = {"vae": {"tiling": "on", "parallel": 2}}
    models = {name: entry | tiles for name, entry in THREE.items()}
    with pytest.raises(ValidationError, match=r"'VAE-flux.chroma': flux has vae\.parallel, whose ranks hold one model"):
        AppArgs(models=models, share=["VAE-flux+chroma"])
    AppArgs(models=models, share=["Encoder-flux+chroma"])


@pytest.mark.parametrize("off", [{}, {"share": "off"}, {"share": False}, {"share": []}])
def test_nothing_is_shared_where_nobody_asks_for_it(off: dict[str, Any]) -> None:
    assert shared_deployments(AppArgs(models=THREE, **off)) == ()


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"model": "o/x", "share": "auto"}, "share is for `models`"),
        ({"share": "on"}, "share"),
        ({"share": ["Denoiser-flux+sd3"]}, "'Denoiser-flux+sd3' must begin with one of Encoder-, VAE-, EncoderVAE-"),
        ({"share": ["flux+sd3"]}, "must begin with one of Encoder-"),
        ({"share": ["Encoder-flux"]}, "'Encoder-flux' must name two models or more"),
        ({"share": ["Encoder-flux+fluxx"]}, "'fluxx' is no model here; did you mean 'flux'"),
        ({"share": ["Encoder-flux+"]}, "'' is no model here; there are flux, chroma, sd3, wan"),
        ({"share": ["Encoder-flux+wan"]}, "wan has no Encoder, it is served with placement: one_stage"),
        ({"share": ["EncoderVAE-flux+sd3"]}, "flux has no EncoderVAE"),
        ({"share": ["Encoder-flux+flux"]}, "flux is in 'Encoder-flux+flux' and in 'Encoder-flux+flux'"),
        ({"share": ["Encoder-flux+sd3", "Encoder-chroma+sd3"]}, "sd3 is in 'Encoder-flux+sd3' and in 'Encoder-chroma"),
        ({"flux": {"watchdog": {"forward_timeout_s": 9}}}, "watchdog must be the same for flux and sd3"),
        ({"flux": {"fence_device_memory": True}}, "fence_device_memory must be the same for flux and sd3"),
        ({"sd3": {"denoising": {"deterministic": True}}}, "denoising.deterministic must be the same for flux and sd3"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(args: dict[str, Any], problem: str) -> None:
    given = dict(args)
    models = {name: entry | given.pop(name, {}) for name, entry in THREE.items()} | {"wan": ONE_STAGE}
    defaults: dict[str, Any] = {} if "model" in given else {"models": models}
    with pytest.raises(ValueError, match=problem.replace("+", r"\+")):
        AppArgs(**{"share": ["Encoder-flux+sd3"]} | defaults | given)


def test_auto_shares_the_deployments_of_models_with_something_in_common(tmp_path: Path) -> None:
    models = {
        "a": checkpoint(tmp_path / "a", text_encoder=1, transformer=2, vae=3),
        "other": checkpoint(tmp_path / "other", text_encoder=7, transformer=2, vae=8),  # a denoiser is never shared
        "b": checkpoint(tmp_path / "b", text_encoder=1, transformer=4, vae=5),
        "c": checkpoint(tmp_path / "c", text_encoder=6, transformer=4, vae=5),
    }
    shared = shared_deployments(AppArgs(models=models, share="auto"))
    assert [each.name for each in shared] == ["Encoder-a+b", "VAE-b+c"]
    half = models | {"b": models["b"] | {"dtype": "float16"}}
    assert shared_deployments(AppArgs(models=half, share="auto")) == ()
    two = {name: entry | {"placement": "two_stage"} for name, entry in models.items()}
    assert [each.name for each in shared_deployments(AppArgs(models=two, share="auto"))] == ["EncoderVAE-a+b+c"]


@pytest.mark.parametrize("elsewhere", ["o/not-in-the-cache", "s3://bucket/model", "/nowhere/model"])
def test_auto_says_of_which_model_it_cannot_tell(tmp_path: Path, elsewhere: str) -> None:
    models = {"a": checkpoint(tmp_path / "a", text_encoder=1, vae=3), "b": {"model": elsewhere}}
    with pytest.raises(ValueError, match="share: auto cannot tell what b has in common: there is no folder"):
        build_app(AppArgs(models=models, share="auto"))
    models["b"] = checkpoint(tmp_path / "b", vae=3)
    (tmp_path / "b" / "text_encoder" / "config.json").write_text("{}")  # the weights were not fetched
    with pytest.raises(ValueError, match="text_encoder has no safetensors here"):
        build_app(AppArgs(models=models, share="auto"))


def test_a_config_whose_models_share_nothing_is_told_so(tmp_path: Path) -> None:
    models = {
        "a": checkpoint(tmp_path / "a", text_encoder=1, transformer=2, vae=3),
        "b": checkpoint(tmp_path / "b", text_encoder=1, transformer=2, vae=3),
        "c": checkpoint(tmp_path / "c", text_encoder=4, transformer=5, vae=6),
    }
    env = {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}}
    application: dict[str, Any] = {"name": "toy", "import_path": "serve_app.app:build_app", "runtime_env": env}
    config: dict[str, Any] = {"http_options": {"host": "127.0.0.1"}, "applications": [application]}
    file = tmp_path / "serve.yaml"

    def problems(share: list[str], deployment: str) -> list[str]:
        application.update(args={"models": models, "share": share}, deployments=[{"name": deployment}])
        file.write_text(yaml.safe_dump(config))
        return check_config(file)

    assert problems(["Encoder-a+b"], "Encoder-a+b") == []
    [problem] = problems(["Encoder-a+b+c"], "Encoder-a+b+c")
    assert "args.share: 'Encoder-a+b+c': c has nothing in common with a and b: leave it out" in problem
    [problem] = problems(["Encoder-a+b"], "Encoder-a")
    assert "no deployment is named 'Encoder-a'; did you mean" in problem


def test_what_a_shared_process_has_already_is_not_counted_twice(tmp_path: Path) -> None:
    models = {name: checkpoint(tmp_path / name, text_encoder=1, vae=number) for number, name in enumerate("ab")}
    args = AppArgs(models=models, share=["Encoder-a+b"])
    [shared] = shared_deployments(args)
    told = {name: model_args(args, name) for name in models}
    assert [held_before(told, name, shared) for name in models] == [set(), {"text_encoder"}]
    demands = [Demand("Encoder-a+b", ("encoder",), 0, weights, 7 - weights) for weights in (5, 1)]
    [together] = each_process_once(demands)
    assert (together.weights, together.activations) == (6, 6)
