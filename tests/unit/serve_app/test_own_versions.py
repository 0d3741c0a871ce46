"""An update of one argument: which deployments get another version, and so other replicas, and which stay."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from ray import serve
from ray.serve._private.build_app import build_app as serve_build_app
from ray.serve._private.config import DeploymentConfig

from serve_app.app import AppArgs, build_app
from serve_app.own_versions import with_own_versions

FLUX = {"Encoder-flux", "Denoiser-flux", "VAE-flux"}
TWO: dict[str, Any] = {
    "models": {"flux": {"model": "o/flux"}, "wan": {"model": "o/wan", "placement": "one_stage"}},
    "aliases": {"sora-2": "wan"},
}


@cache
def versions(args: str) -> dict[str, str]:
    """By deployment, after the way from the process that builds an application to Serve's controller.

    Serve's own version, a hash of the arguments, is set before.
    """
    of_deployments = {}
    for each in serve_build_app(build_app(AppArgs(**json.loads(args))), name="triptych").deployments:
        config = each._deployment_config
        config.version = args
        of_deployments[each.name] = DeploymentConfig.from_proto_bytes(config.to_proto_bytes()).version
    return of_deployments


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    earlier, later = versions(json.dumps(before)), versions(json.dumps(after))
    return {name for name in later if earlier.get(name) != later[name]}


def with_model(name: str, **arguments: Any) -> dict[str, Any]:
    return TWO | {"models": TWO["models"] | {name: TWO["models"][name] | arguments}}


@pytest.mark.parametrize(
    ("after", "restarted"),
    [
        (TWO, set()),
        (with_model("flux", dtype="float16"), {*FLUX, "Ingress"}),
        (with_model("flux", denoising={"checkpoint_every": 7}), {*FLUX, "Ingress"}),
        (with_model("flux", model="o/other"), {*FLUX, "Ingress"}),
        (with_model("flux", adapters={"sketch": "o/sketch"}), {*FLUX, "Ingress"}),
        (with_model("wan", compile="regional"), {"Pipeline-wan", "Ingress"}),
        (with_model("flux", limits={"max_steps": 7}), {"Ingress"}),
        (with_model("flux", model_keys=("studio",)) | {"api_keys_file": "/etc/keys"}, {"Ingress"}),
        (with_model("flux", placement="two_stage"), {"EncoderVAE-flux", "Denoiser-flux", "Ingress"}),
        (TWO | {"aliases": {"sora-2": "flux"}}, {"Ingress"}),
        (TWO | {"jobs": {"lease_s": 7}}, {"Ingress"}),
        (TWO | {"models": TWO["models"] | {"draft": {"model": "o/draft", "placement": "one_stage"}}},
         {"Pipeline-draft", "Ingress"}),
        (TWO | {"models": dict(reversed(TWO["models"].items()))}, {"Ingress"}),  # the first that can is another one
        (TWO | {"models": {"flux": TWO["models"]["flux"]}, "aliases": {}}, {"Ingress"}),
    ],
)  # fmt: skip
def test_an_update_restarts_the_deployments_that_it_concerns_and_no_other(
    after: dict[str, Any], restarted: set[str]
) -> None:
    assert changed(TWO, after) == restarted


def test_with_one_model_an_argument_of_the_ingress_leaves_the_stages_alone() -> None:
    assert changed({"model": "o/flux"}, {"model": "o/flux", "limits": {"max_steps": 7}}) == {"Ingress"}
    assert changed({"model": "o/flux"}, {"model": "o/flux", "dtype": "float16"}) == {
        "Encoder", "Denoiser", "VAE", "Ingress",
    }  # fmt: skip


def test_a_versioned_deployment_keeps_all_its_options() -> None:
    for each in serve_build_app(build_app(AppArgs(**TWO)), name="triptych").deployments:
        versioned = each._deployment_config
        plain = DeploymentConfig.model_construct(_fields_set=set(versioned.model_fields_set), **dict(versioned))
        versioned.to_proto_bytes()
        plain.version = versioned.version
        assert versioned.to_proto() == plain.to_proto()
        assert each.options(max_ongoing_requests=3)._deployment_config._own_version == versioned.version


def test_an_argument_that_no_version_can_be_made_of_is_refused_by_its_type() -> None:
    @serve.deployment
    class Stage:
        def __init__(self, argument: Any) -> None:
            self.argument = argument

    with pytest.raises(TypeError, match="hold a object"):
        with_own_versions(Stage.bind([object()]))  # type: ignore[attr-defined]
