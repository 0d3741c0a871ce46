"""The check of a Serve config's environment variables before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from env_config.serve_config import check_serve_config


def serve_config(application_env: Any, deployment_env: Any | None = None) -> dict[str, Any]:
    application: dict[str, Any] = {
        "name": "triptych",
        "import_path": "serve_app.app:build_app",
        "runtime_env": {"env_vars": application_env},
    }
    if deployment_env is not None:
        options = {"runtime_env": {"env_vars": deployment_env}}
        application["deployments"] = [{"name": "Denoiser", "ray_actor_options": options}, {"name": "VAE"}]
    return {"applications": [application]}


def check(tmp_path: Path, *documents: Any) -> list[str]:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return [error.removeprefix(f"{file}: ") for error in check_serve_config(file)]


def test_a_good_file_that_serve_accepts_has_no_errors(tmp_path: Path) -> None:
    config = serve_config({"SGLANG_CACHE_DIT_ENABLED": "1", "OTHER": "x"}, {"SGLANG_CACHE_DIT_FN": "8"})
    ServeDeploySchema.model_validate(config)
    assert check(tmp_path, config) == []


def test_a_bad_value_of_the_application_is_reported_once(tmp_path: Path) -> None:
    assert check(tmp_path, serve_config({"SGLANG_CACHE_DIT_FN": "0"}, {})) == [
        "application 'triptych': SGLANG_CACHE_DIT_FN = '0': must be an integer of at least 1"
    ]


def test_a_bad_value_of_a_deployment_names_the_deployment(tmp_path: Path) -> None:
    assert check(tmp_path, serve_config({}, {"SGLANG_CACHE_DIT_FN": "0"})) == [
        "application 'triptych', deployment 'Denoiser': SGLANG_CACHE_DIT_FN = '0': must be an integer of at least 1"
    ]


def test_a_deployments_variables_are_merged_over_the_applications(tmp_path: Path) -> None:
    inherited = {"SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "8", "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1"}
    assert check(tmp_path, serve_config(inherited, {"SGLANG_CACHE_DIT_SCM_CACHE_BINS": "2"})) == []
    (error,) = check(tmp_path, serve_config(inherited, {"SGLANG_CACHE_DIT_SCM_CACHE_BINS": ""}))
    assert error.startswith("application 'triptych', deployment 'Denoiser': SGLANG_CACHE_DIT_SCM_CACHE_BINS")


def test_an_unknown_name_is_an_error_with_the_closest_name(tmp_path: Path) -> None:
    assert check(tmp_path, serve_config({"SGLANG_CACHE_DIT_WARMPU": "2", "SGLANG_PLUGINS": "x"})) == [
        "application 'triptych': SGLANG_CACHE_DIT_WARMPU is not a known variable; "
        "the closest name is SGLANG_CACHE_DIT_WARMUP",
        "application 'triptych': SGLANG_PLUGINS is an undocumented variable of SGLang and is not supported here",
    ]


@pytest.mark.parametrize("value", [8, True, 0.24, None])
def test_a_value_that_yaml_does_not_read_as_text_must_be_quoted(tmp_path: Path, value: Any) -> None:
    (error,) = check(tmp_path, serve_config({"SGLANG_CACHE_DIT_FN": value}))
    assert "SGLANG_CACHE_DIT_FN must be text: put its value in quotes" in error


def test_an_unquoted_bucket_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    (error,) = check(tmp_path, serve_config({"SGLANG_CLOUD_STORAGE_TYPE": "s3", "SGLANG_S3_BUCKET_NAME": 2024}))
    assert "must be text" in error


def test_a_value_that_ray_expands_on_the_node_is_not_judged(tmp_path: Path) -> None:
    environ = {"SGLANG_CACHE_DIT_FN": "${FN}", "SGLANG_S3_ACCESS_KEY_ID": "${KEY}"}
    (error,) = check(tmp_path, serve_config({**environ, "SGLANG_CACHE_DIT_BN": "-1"} | KEY_PAIR))
    assert "SGLANG_CACHE_DIT_BN" in error


KEY_PAIR = {"SGLANG_S3_ACCESS_KEY_ID": "${KEY}", "SGLANG_S3_SECRET_ACCESS_KEY": "${SECRET}"}


def test_no_error_shows_a_secret(tmp_path: Path) -> None:
    (error,) = check(tmp_path, serve_config({"SGLANG_S3_SECRET_ACCESS_KEY": "opensesame"}))
    assert "SGLANG_S3_SECRET_ACCESS_KEY" in error
    assert "sesame" not in error


def test_every_application_of_the_file_is_checked(tmp_path: Path) -> None:
    config = serve_config({"SGLANG_CACHE_DIT_FN": "0"})
    config["applications"] += serve_config({"SGLANG_CACHE_DIT_BN": "-1"})["applications"]
    config["applications"][1]["name"] = "second"
    first, second = check(tmp_path, config)
    assert first.startswith("application 'triptych': SGLANG_CACHE_DIT_FN")
    assert second.startswith("application 'second': SGLANG_CACHE_DIT_BN")


def test_the_serve_config_inside_a_kuberay_file_is_checked(tmp_path: Path) -> None:
    text = yaml.safe_dump(serve_config({"SGLANG_CACHE_DIT_FN": "0"}))
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "spec": {"serveConfigV2": text}}
    (error,) = check(tmp_path, {"kind": "ConfigMap", "data": {}}, service)
    assert error.startswith("application 'triptych': SGLANG_CACHE_DIT_FN")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a list", "holds no Serve config"),
        ("applications: text", "`applications` must be a list of mappings"),
        ("applications: [{name: a, runtime_env: text}]", "`runtime_env` must be a mapping, got str"),
        ("applications: [{name: a, deployments: [1]}]", "`deployments` must be a list of mappings"),
        ("applications: [", "while parsing"),
    ],
)
def test_a_file_that_is_no_serve_config_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text, encoding="utf-8")
    (error,) = check_serve_config(file)
    assert error.startswith(f"{file}: ")
    assert message in error


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    (error,) = check_serve_config(tmp_path / "none.yaml")
    assert "No such file" in error


def test_a_key_that_stands_twice_is_an_error_also_inside_a_kuberay_file(tmp_path: Path) -> None:
    twice = yaml.safe_dump(serve_config({})) + "applications: []\n"
    file = tmp_path / "serve.yaml"
    for text in (twice, yaml.safe_dump({"kind": "RayService", "spec": {"serveConfigV2": twice}})):
        file.write_text(text, encoding="utf-8")
        (error,) = check_serve_config(file)
        assert "'applications' stands twice" in error
