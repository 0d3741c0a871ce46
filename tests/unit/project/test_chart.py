"""The Helm chart: its values are those of its schema, its examples serve, and what Helm makes of them fits KubeRay."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from env_config.ray_proxy import AROUND_PROXY, VARIABLE
from serve_app.app import AppArgs
from serve_app.tools.check_config import check_config, check_serve_config_schema
from tests.support.chart_values import CHART, EXAMPLES, ROOT, read, serve_config, values_of

HELM = shutil.which("helm")
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
RAY_SERVICE = json.loads((ROOT / "tests/support/kuberay_rayservice_schema.json").read_text(encoding="utf-8"))
SERVE_FILES = {each.name: each for each in (ROOT / "ray_configs").rglob("serve_*.yaml")}

with_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed")


def file_name(file: Path) -> str:
    return file.name


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    found = jsonschema.Draft7Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in found]


def rendered(*arguments: str) -> list[Any]:
    assert HELM is not None
    made = subprocess.run([HELM, "template", "demo", str(CHART), *arguments], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return [each for each in yaml.safe_load_all(made.stdout) if each]


def test_the_charts_own_values_are_those_of_its_schema() -> None:
    assert problems(SCHEMA, read(CHART / "values.yaml")) == []
    assert set(read(CHART / "values.yaml")) == set(SCHEMA["properties"]) - {"global"}


def test_a_value_that_the_chart_does_not_know_is_refused() -> None:
    assert problems(SCHEMA, {"serve": {"argz": {}}}) != []
    assert problems(SCHEMA, {"serve": {"variables": {"SGLANG_S3_SECRET_ACCESS_KEY": "x"}}}) != []
    assert problems(SCHEMA, {"serve": {"deployments": {"Encoders": {}}}}) != []


@pytest.mark.parametrize("example", EXAMPLES, ids=file_name)
def test_an_example_has_no_problems(example: Path) -> None:
    values = values_of(example)
    assert problems(SCHEMA, values) == []
    config = serve_config(values)
    AppArgs(**config["applications"][0]["args"])
    assert check_serve_config_schema(config) == []


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.name.startswith("flux")], ids=file_name)
def test_an_example_for_a_gpu_serves_what_its_serve_file_does(example: Path) -> None:
    [made] = serve_config(values_of(example))["applications"]
    [original] = read(SERVE_FILES[f"serve_{example.name}"])["applications"]
    assert made == original


def test_the_chart_names_the_version_of_the_project_and_the_pinned_ray() -> None:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    [ray] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert read(CHART / "Chart.yaml")["appVersion"] == version
    assert read(CHART / "values.yaml")["rayVersion"] == ray


def test_every_value_is_read_by_a_template() -> None:
    """One without effect is a promise that nobody keeps."""
    text = "".join(each.read_text(encoding="utf-8") for each in (CHART / "templates").iterdir())
    values = read(CHART / "values.yaml")
    for name, value in values.items():
        whole = re.search(
            rf"(toYaml|with|range|index) \$?(values|\.Values)\.{name}\b(?!\.)|\"group\" \.Values\.{name}\b", text
        )
        for key in value if isinstance(value, dict) and not whole else [""]:
            assert re.search(rf"\.?[vV]alues\.{name}\b" + (rf"\.{key}\b" if key else ""), text), f"{name}.{key}"


@with_helm
@pytest.mark.parametrize("example", EXAMPLES, ids=file_name)
def test_helm_makes_a_ray_service_that_kuberay_knows(example: Path, tmp_path: Path) -> None:
    made = rendered("--namespace", "pictures", "--values", str(example))
    [service] = [each for each in made if each["kind"] == "RayService"]
    assert problems(RAY_SERVICE, service) == []
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        assert {"name": VARIABLE, "value": AROUND_PROXY} in container["env"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(made))
    assert check_config(file) == []
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert "demo-triptych-serve-svc.pictures" in config["applications"][0]["args"].pop("allowed_hosts")
    ours = serve_config(values_of(example))
    ours["applications"][0]["deployments"].sort(key=lambda each: each["name"])
    assert config == ours


@with_helm
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serve.args.model=", "serve.args.model must be written"),
        ("upgrade.type=NewClusterWithIncrementalUpgrade", "upgrade.options must have gatewayClassName"),
        ("gcsFaultTolerance.enabled=true", "gcsFaultTolerance.redisAddress must be written"),
        ("ingress.enabled=true", "ingress.hosts must name a host"),
        ("secrets.environment.HF_TOKEN=token", "secrets.existingSecret, which is empty"),
        ("workerGroups.cpu.minReplicas=9", "workerGroups.cpu.minReplicas is 9, more than maxReplicas, 2"),
        ("serviceAccount.create=false", "the head needs a service account of its own"),
    ],
)
def test_helm_refuses_values_that_cannot_work_together(setting: str, said: str) -> None:
    assert HELM is not None
    command = [HELM, "template", "demo", str(CHART), "--values", str(CHART / "examples/cpu.yaml"), "--set", setting]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode != 0
    assert said in made.stderr


@with_helm
def test_the_port_of_the_options_is_that_of_the_config_and_of_the_pods() -> None:
    made = rendered("--values", str(CHART / "examples/cpu.yaml"), "--set", "serve.httpOptions.port=9000")
    [service] = [each for each in made if each["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 9000}
    [container] = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 9000} in container["ports"]
