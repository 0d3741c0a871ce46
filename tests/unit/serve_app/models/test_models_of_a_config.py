"""Several models in the `args` of a Serve config: what is built of them, and which mistakes are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.app import AppArgs, build_app, model_args, service_args
from serve_app.service import ServiceArgs
from serve_app.tools.check_config import check_config, deployment_names
from serve_app.tools.verify import MisuseError, with_one_model

TWO: dict[str, Any] = {"models": {"flux": {"model": "o/flux"}, "wan": {"model": "o/wan", "placement": "one_stage"}}}


def problems_of(folder: Path, args: dict[str, Any], deployments: list[dict[str, Any]] | None = None) -> list[str]:
    application = {"name": "toy", "import_path": "serve_app.app:build_app", "args": args}
    config = {"http_options": {"host": "127.0.0.1"}, "applications": [application | {"deployments": deployments or []}]}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return [problem.removeprefix(f"{file}: ") for problem in check_config(file)]


def test_each_model_has_stages_that_are_named_after_it_and_one_alone_has_todays() -> None:
    several = deployment_names(build_app(AppArgs(**TWO)))
    assert set(several) == {"Encoder-flux", "Denoiser-flux", "VAE-flux", "Pipeline-wan", "Ingress"}
    assert set(deployment_names(build_app(AppArgs(model="o/flux")))) == {"Encoder", "Denoiser", "VAE", "Ingress"}


def test_one_model_and_the_same_under_models_are_told_alike_to_ingress_and_stages() -> None:
    own: dict[str, Any] = {"model": "o/flux", "limits": {"max_steps": 7}, "adapters": {"a": "o/a"}, "dtype": "float16"}
    alone = AppArgs(**own, model_name="mine", model_aliases=("gpt-image-1", "mine"))
    among = AppArgs(models={"mine": own}, aliases={"gpt-image-1": "mine"})
    assert service_args(alone) == service_args(among)
    assert model_args(alone) == model_args(among, "mine")
    assert service_args(AppArgs(model="o/flux", model_aliases=["a"])).names == {"a": "flux"}


def test_each_model_drains_and_is_told_its_own() -> None:
    args = AppArgs(models={"a": {"model": "o/a", "admission": {"max_queue_s": 9000}}, "b": {"model": "o/b"}})
    assert build_app(args)._bound_deployment._deployment_config.graceful_shutdown_timeout_s == 9300
    assert [model_args(args, name).path for name in args.entries] == ["o/a", "o/b"]
    with pytest.raises(ValueError, match="there are a, b"):
        model_args(args)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({}, "model is required, or several models in `models`"),
        ({"models": {}}, "model is required, or several models in `models`"),
        (TWO | {"model": "o/x"}, "model is of no effect beside models: give it to each of them"),
        (TWO | {"placement": "one_stage"}, "placement is of no effect beside models"),
        (TWO | {"limits": {}}, "limits is of no effect beside models: give it to each of them, as models.NAME.limits"),
        (TWO | {"model_name": "x"}, "model_name is of no effect beside models"),
        (TWO | {"model_aliases": ["x"]}, "model_aliases is of no effect beside models: say `aliases: {NAME: MODEL}`"),
        (TWO | {"aliases": {"gpt-image-1": "fluxx"}}, "aliases.gpt-image-1: 'fluxx' is no model here; did you mean"),
        (TWO | {"aliases": {"wan": "flux"}}, "aliases: 'wan' is taken: a model is called so"),
        (TWO | {"aliases": {"": "flux"}}, "aliases"),
        (TWO | {"defaults": {"image": "sd3"}}, "defaults.image: 'sd3' is no model here; there are flux, wan"),
        (TWO | {"defaults": {"picture": "flux"}}, "defaults"),
        ({"model": "o/x", "aliases": {"a": "x"}}, "aliases is for `models`"),
        ({"model": "o/x", "defaults": {"image": "x"}}, "defaults is for `models`"),
        ({"models": {"a/b": {"model": "o/x"}}}, "must be 1 to 64 of the letters"),
        ({"models": {"a:b": {"model": "o/x"}}}, "must be 1 to 64 of the letters"),
        ({"models": {"a": {}}}, "models.a.model: Field required"),
        ({"models": {"a": {"modle": "o/x"}}}, "models.a.modle: unknown key; did you mean 'model'?"),
        ({"models": {"a": {"model": "o/x", "playground": False}}}, "models.a.playground: unknown key"),
        ({"models": {"a": {"model": "o/x", "limits": {"max_step": 1}}}}, "models.a.limits.max_step: unknown key"),
        (
            {"models": {"a": {"model": "o/x", "model_keys": ["b"]}, "c": {"model": "o/y"}}},
            "models.a.model_keys is of no",
        ),
        ({"model": "o/x", "model_keys": ["b"]}, "model_keys is of no effect without api_keys_file"),
        (
            {"models": {"a": {"model": "o/x", "adapters": {"s": "o/s"}}}, "aliases": {"a:s": "a"}},
            "adapters: 's' is taken",
        ),
        (
            {
                "models": {"a": {"model": "o/x", "adapters": {"s": "o/s"}}, "b": {"model": "o/y"}},
                "aliases": {"a:s": "b"},
            },
            "adapters: 's' is taken",
        ),
        (
            {"models": {"a": {"model": "o/x", "adapters": {"s": "./nowhere.safetensors"}}}},
            "args.models.a.adapters.s.path: there is no file or folder",
        ),
    ],
)
def test_a_mistake_is_refused_by_its_name(tmp_path: Path, args: dict[str, Any], problem: str) -> None:
    problems = problems_of(tmp_path, args)
    assert any(problem in each for each in problems), problems
    if "unknown key" not in problem and "nowhere" not in str(args):  # the check alone looks at these
        with pytest.raises(ValidationError):
            AppArgs.model_validate(args)


def test_two_models_or_defaults_of_one_name_are_refused(tmp_path: Path) -> None:
    problems_of(tmp_path, TWO)
    file = tmp_path / "serve.yaml"
    for line in ("      flux: {model: o/other}\n", "    defaults: {image: flux, image: wan}\n"):
        text = file.read_text().replace(
            "    models:\n", f"    models:\n{line}" if "other" in line else f"{line}    models:\n"
        )
        twice = tmp_path / "twice.yaml"
        twice.write_text(text)
        assert any("twice" in problem for problem in check_config(twice)), text


def test_the_deployments_of_every_model_are_checked(tmp_path: Path) -> None:
    cuda = {"SGLANG_DIFFUSION_TARGET_DEVICE": "cuda"}
    options = {"num_gpus": 1, "runtime_env": {"env_vars": cuda}}
    names = ("Encoder-flux", "Denoiser-flux", "VAE-flux", "Pipeline-wan")
    good = [{"name": name, "ray_actor_options": options} for name in names]
    assert problems_of(tmp_path, TWO, good) == []
    wrong = [*good[:3], {"name": "Pipeline-wan", "ray_actor_options": options | {"num_gpus": 0}}]
    [problem] = problems_of(tmp_path, TWO, wrong)
    assert "deployments[Pipeline-wan]" in problem
    [problem] = problems_of(tmp_path, TWO, [*good, {"name": "Denoiser-wan"}])
    assert "no deployment is named 'Denoiser-wan'" in problem


def test_a_tool_looks_at_one_of_the_models_as_if_it_was_alone() -> None:
    names = ("Denoiser-a", "Denoiser-b-a", "Encoder-a+b-a", "VAE-a+b", "Ingress")
    deployments = [{"name": name} for name in names]
    args = {"models": {"a": {"model": "o/a"}, "b-a": {"model": "o/b"}}, "playground": False}
    application = {"name": "toy", "args": args, "deployments": deployments}
    one = with_one_model(application, "b-a")
    assert (one["args"], one["deployments"]) == (
        {"model": "o/b", "model_name": "b-a"},
        [{"name": "Denoiser"}, {"name": "Encoder"}],
    )
    with pytest.raises(MisuseError, match="the models a, b-a: choose with --name NAME"):
        with_one_model(application, None)
    with pytest.raises(MisuseError, match="has only one"):
        with_one_model({"args": {"model": "o/a"}}, "a")


def test_the_ingress_alone_takes_models_without_what_the_stages_need() -> None:
    args = ServiceArgs(models={"flux": {}, "wan": {"limits": {"max_steps": 3}}}, aliases={"sora-2": "wan"})
    assert list(args.served) == ["flux", "wan"]
    assert args.served["wan"].limits.max_steps == 3
