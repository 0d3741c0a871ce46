"""Dockerfile, .dockerignore and compose.yaml name what is there, and fit each other, the project and its configs."""

import ast
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from env_config.ray_proxy import AROUND_PROXY, VARIABLE
from serve_app.app import AppArgs
from serve_app.tools.check_config import check_config

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIGS = sorted((ROOT / "ray_configs/containers").glob("*.yaml"))
USER = "10001"


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def stages() -> dict[str, str]:
    """The text of each stage by its name."""
    parts = re.split(r"^FROM .+ AS (\w[\w-]*)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def application_of(file: Path) -> Any:
    [application] = yaml.safe_load(file.read_text(encoding="utf-8"))["applications"]
    return application


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = {each for line in instructions("COPY") if "--from" not in line for each in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {each for each in copied if not (ROOT / each).exists()} == set()
    assert copied == allowed


@pytest.mark.parametrize("path", [".git/config", "secrets/jobs_url", ".venv/bin/python", "outputs/serve.log", ".env"])
def test_what_is_no_business_of_an_image_is_ignored(path: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert not any(fnmatch(path.split("/")[0], line[1:]) for line in lines if line.startswith("!"))


def test_the_python_of_the_image_is_one_that_the_project_runs_on() -> None:
    [(major, minor)] = re.findall(r"PYTHON_IMAGE=python:(\d+)\.(\d+)-", DOCKERFILE)
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least is not None
    assert (int(major), int(minor)) >= tuple(map(int, least.groups()))
    assert (int(major), int(minor)) == (3, 11)  # what constraints.txt was tried with


def test_every_extra_that_is_installed_is_one_of_the_project() -> None:
    asked = [set(each.split(",")) for each in re.findall(r"ARG EXTRAS=(\S+)", DOCKERFILE)]
    assert len(asked) == 2
    assert all(each <= set(PROJECT["optional-dependencies"]) for each in asked)
    assert all({"s3", "postgresql", "tracing"} <= each for each in asked)


def test_every_installation_keeps_to_the_constraints() -> None:
    """But for wheels that were made or chosen one by one."""
    for command in re.findall(r"pip --python \S+ install ([^&;]+)", DOCKERFILE):
        assert "--constraint constraints.txt" in command or "--no-deps" in command, command


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_nobody_special_with_the_launcher_as_its_program(target: str) -> None:
    stage = stages()[target]
    assert re.findall(r"^USER (.+)$", stage, re.MULTILINE) == [f"{USER}:{USER}"]
    [command] = re.findall(r"^CMD (\[.+\])$", stage, re.MULTILINE)
    assert [ROOT / each for each in json.loads(command)] == [ROOT / f"ray_configs/containers/emoji_{target}.yaml"]
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["tini", "--", "python", "-m", "serve_app.tools.launch"]


def test_the_labels_have_the_version_of_the_project() -> None:
    assert instructions("ARG")[-2:-1] == [f"VERSION={PROJECT['version']}"]


def test_the_proxies_of_the_image_are_wrapped() -> None:
    assert f"{VARIABLE}={AROUND_PROXY}" in DOCKERFILE


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_of_a_container_has_no_problems_and_can_be_reached(config: Path) -> None:
    assert check_config(config) == []
    AppArgs(**application_of(config)["args"])
    options = yaml.safe_load(config.read_text(encoding="utf-8"))["http_options"]
    assert options == {"host": "0.0.0.0", "port": 8000}


def test_the_health_check_asks_where_the_configs_listen() -> None:
    [check] = re.findall(r"CMD (\[\"wget\".+\])", DOCKERFILE)
    assert json.loads(check)[-1] == "http://127.0.0.1:8000/health"


def test_compose_mounts_what_is_there_and_builds_a_target_that_is_there() -> None:
    triptych = COMPOSE["services"]["triptych"]
    mounted = [each.split(":")[0] for each in triptych["volumes"] if each.startswith("./")]
    assert [each for each in mounted if not (ROOT / each).is_file()] == []
    assert triptych["build"]["target"] in stages()
    assert triptych["image"] == f"triptych:{PROJECT['version']}-{triptych['build']['target']}"
    assert set(triptych["build"]["args"]) <= {each.split("=")[0] for each in instructions("ARG")}


def test_compose_gives_the_files_that_its_config_names() -> None:
    triptych = COMPOSE["services"]["triptych"]
    args = application_of(ROOT / "ray_configs/containers/with_s3_and_postgresql.yaml")["args"]
    named = {args["api_keys_file"], args["jobs"]["store_url"]["file"]}
    named.add(triptych["environment"]["AWS_SHARED_CREDENTIALS_FILE"])
    assert named == {f"/run/secrets/{name}" for name in triptych["secrets"]}


def test_compose_holds_no_secret_and_every_service_is_bounded() -> None:
    for name, service in COMPOSE["services"].items():
        assert set(service["secrets"]) <= set(COMPOSE["secrets"]), name
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        assert not [key for key in service.get("environment", {}) if re.search("PASSWORD$|KEY$|TOKEN$", key)], name
    assert all(each["file"].startswith("secrets/") for each in COMPOSE["secrets"].values())
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_starts_triptych_after_what_it_needs_and_opens_only_its_port_to_this_machine() -> None:
    services = dict(COMPOSE["services"])
    triptych = services.pop("triptych")
    assert set(triptych["depends_on"]) == set(services)
    assert all("healthcheck" in each and "ports" not in each for each in services.values())
    assert all(each.startswith("127.0.0.1:") for each in triptych["ports"])
    assert triptych["read_only"] is True


def test_the_python_of_the_clients_page_compiles() -> None:
    page = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        ast.parse(block)
