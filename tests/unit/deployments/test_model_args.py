"""The parts that a configuration names are checked before anything starts: by key, by path, by what each must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.model import ComponentsArgs, DenoisingArgs, PartArgs
from serve_app.app import AppArgs, located, model_args
from serve_app.tools.check_config import check_config


def components(**given: Any) -> ComponentsArgs:
    return ComponentsArgs.model_validate(given)


def test_a_path_alone_is_a_part_and_a_list_has_several() -> None:
    given = components(vae="a/b", controlnet=["one", {"path": "two", "subfolder": "./net/"}], safety_checker=None)
    assert given.parts == {
        "vae": (PartArgs(path="a/b"),),
        "controlnet": (PartArgs(path="one"), PartArgs(path="two", subfolder="net")),
        "safety_checker": None,
    }


def test_the_image_encoder_of_an_ip_adapter_lies_beside_its_weights_unless_it_is_named() -> None:
    adapter = components(ip_adapter={"path": "h94/a", "subfolder": "models", "weight_name": "a.safetensors"}).ip_adapter
    assert adapter is not None
    assert adapter.reader == PartArgs(path="h94/a", subfolder="models/image_encoder")
    named = adapter.model_copy(update={"image_encoder": PartArgs(path="openai/clip")})
    assert named.reader == PartArgs(path="openai/clip")


@pytest.mark.parametrize("scale", [0.5, [0.5, 0.5]])
def test_one_scale_is_that_of_every_file(scale: Any) -> None:
    adapter = components(ip_adapter={"path": "a", "weight_name": ["a.bin", "b.safetensors"], "scale": scale}).ip_adapter
    assert adapter is not None
    assert adapter.scales == (0.5, 0.5)


ADAPTER = {"path": "a", "weight_name": "a.bin"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"vae": {"path": "a", "subfolder": "../b"}}, "must be a path inside"),
        ({"vae": {"path": "a", "subfolder": "/etc"}}, "must be a path inside"),
        ({"vae": {"pth": "a"}}, "path"),
        ({"vae": ""}, "at least 1 character"),
        ({"vae": 3}, "valid"),
        ({"controlnet": []}, "controlnet: the list is empty"),
        ({"not a name": "a"}, "'not a name' cannot be the name of a component"),
        ({"ip_adapter": "a"}, "ip_adapter"),
        ({"ip_adapter": {"path": "a"}}, "weight_name"),
        ({"ip_adapter": {**ADAPTER, "weight_name": "a.pt"}}, "must be the name of a .safetensors or .bin file"),
        ({"ip_adapter": {**ADAPTER, "weight_name": "../a.bin"}}, "must be a path inside"),
        ({"ip_adapter": {**ADAPTER, "weight_name": []}}, "weight_name names no file"),
        ({"ip_adapter": {**ADAPTER, "scale": [1, 2]}}, "scale has 2 numbers for 1 files"),
    ],
)
def test_what_cannot_be_a_part_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        components(**given)


def test_folders_that_are_here_are_found_whatever_folder_a_replica_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = located(
        components(
            vae={"path": "nets", "subfolder": "deep"},
            unet="org/name",
            ip_adapter={"path": "nets", "weight_name": "a.bin", "image_encoder": "nets/deep"},
        )
    )
    assert found.parts["vae"] == (PartArgs(path=str(tmp_path / "nets"), subfolder="deep"),)
    assert found.parts["unet"] == (PartArgs(path="org/name"),)
    assert found.ip_adapter is not None
    assert found.ip_adapter.path == str(tmp_path / "nets")
    assert found.ip_adapter.image_encoder == PartArgs(path=str(tmp_path / "nets" / "deep"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"controlnet": "a/b", "vae": {"path": "c/d", "subfolder": "vae"}, "unet": None}, None),
        (
            {"controlnet": ["a/b", {"path": "c/d", "subfoldr": "x"}]},
            "controlnet[1].subfoldr: unknown key; did you mean",
        ),
        ({"ip_adapter": {**ADAPTER, "weight": "a"}}, "components.ip_adapter.weight: unknown key; did you mean"),
    ],
)
def test_a_configuration_with_parts_is_checked_to_the_last_key(
    given: dict[str, Any], sentence: str | None, tmp_path: Path
) -> None:
    application = {
        "name": "a",
        "import_path": "serve_app.app:build_app",
        "args": {"model": "checkpoints/emoji-flux", "components": given},
        "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}},
    }
    config = {"http_options": {"host": "127.0.0.1"}, "applications": [application]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    found = check_config(tmp_path / "serve.yaml")
    assert [sentence is not None and sentence in problem for problem in found] == ([True] if sentence else [])


def test_a_pipeline_class_is_a_name() -> None:
    with pytest.raises(ValidationError, match="pipeline_class"):
        AppArgs(model="a", pipeline_class="os.system")


def app_args(text: str) -> AppArgs:
    return AppArgs.model_validate({"model": "m", **yaml.safe_load(text)})


@pytest.mark.parametrize(
    ("text", "compiled"),
    [
        ("{}", "off"),
        ("compile: off", "off"),  # which YAML reads as false
        ("compile: whole", "whole"),
        ("compile: {transformer: regional, transformer_2: off}", {"transformer": "regional", "transformer_2": "off"}),
    ],
)
def test_what_is_compiled_is_told_to_the_stages(text: str, compiled: Any) -> None:
    assert model_args(app_args(text)).compile == compiled


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("compile: on", "compile"),
        ("compile: max-autotune", "'off', 'regional' or 'whole'"),
        ("compile: {transformer: fast}", r"compile[\s\S]*transformer[\s\S]*'off', 'regional' or 'whole'"),
        ("{compile: regional, denoising: {deterministic: true}}", "compile is of no effect with denoising.determin"),
        ("warm_up: 3", "warm_up"),
        ("warm_up: [{width: 64}, 7]", "warm_up.1"),
    ],
)
def test_settings_of_the_start_are_checked(text: str, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        app_args(text)


def test_requests_to_warm_up_are_told_to_the_stages() -> None:
    given = "warm_up: [{size: 1024x1024, num_inference_steps: 4}, {width: 512}]"
    assert model_args(app_args(given)).warm_up == ({"size": "1024x1024", "num_inference_steps": 4}, {"width": 512})


def test_passes_together_are_refused_where_every_forward_runs_alone() -> None:
    assert DenoisingArgs().guidance_passes == "apart"
    with pytest.raises(ValidationError, match="guidance_passes: together is of no effect with deterministic"):
        DenoisingArgs(guidance_passes="together", deterministic=True)
    with pytest.raises(ValidationError, match="'apart', 'together' or 'auto'"):
        DenoisingArgs.model_validate({"guidance_passes": "both"})
