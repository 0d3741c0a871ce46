"""Check the environment variables of a Serve config file before anything starts."""

import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from env_config.section import EnvConfigError, Problem
from env_config.variables import EnvConfig, unknown_variables

EXPANDED_BY_RAY = re.compile(r"\$(\w|\{)")  # "${NAME}" gets its value on the node that runs the replica


UNREADABLE = (OSError, ValueError, RecursionError, yaml.YAMLError)  # what reading a file raises


def check_serve_config(file: Path | str) -> list[str]:
    """What is wrong with the `env_vars` of a Serve config or KubeRay RayService file; empty when all is well."""
    try:
        configs = read_serve_configs(Path(file))
    except UNREADABLE as error:
        return [f"{file}: {error}"]
    return [f"{file}: {problem}" for problem in check_all_env_vars(configs)]


class ConfigShapeError(ValueError):
    """A part of the file is not what a Serve config holds there."""


def read_serve_configs(file: Path) -> list[Mapping[str, Any]]:
    """The Serve configs in the file, at least one, read strictly. Raises one of UNREADABLE."""
    documents = list(yaml.load_all(read_text(file), StrictLoader))
    configs = [config for document in documents for config in serve_configs_of(document)]
    if not configs:
        raise ConfigShapeError("holds no Serve config (a mapping with a list of `applications`)")
    return configs


def read_text(file: Path) -> str:
    """Raises ConfigShapeError, saying what the file is instead of text."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigShapeError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigShapeError(f"is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not text.strip():
        raise ConfigShapeError("is empty: write a Serve config into it, such as one of ray_configs/")
    return text


def check_all_env_vars(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the `env_vars` of the configs, one sentence each.

    Each deployment is checked with its own variables merged over its application's, as Serve merges them.
    """
    problems: list[str] = []
    for config in configs:
        try:
            applications = list_of_mappings(config, "applications")
        except ConfigShapeError as error:
            problems.append(str(error))
        else:
            problems += [problem for application in applications for problem in check_application(application)]
    return problems


def serve_configs_of(document: Any) -> list[Mapping[str, Any]]:
    """The document itself, or the one that a RayService carries as text; no other object holds one."""
    if not isinstance(document, Mapping):
        return []
    if document.get("kind") == "RayService":
        document = yaml.load(str(mapping(document, "spec").get("serveConfigV2", "")), StrictLoader)
    return [document] if isinstance(document, Mapping) and "applications" in document else []


def check_application(application: Mapping[str, Any]) -> list[str]:
    name = f"application {application.get('name', 'default')!r}"
    try:
        inherited = env_vars_of(application)
        deployments = [
            (deployment.get("name"), env_vars_of(mapping(deployment, "ray_actor_options")))
            for deployment in list_of_mappings(application, "deployments")
        ]
    except ConfigShapeError as error:
        return [f"{name}: {error}"]
    inherited_errors = check_env_vars(inherited)
    errors = [f"{name}: {error}" for error in inherited_errors]
    for deployment_name, own in deployments:
        errors += [
            f"{name}, deployment {deployment_name!r}: {error}"
            for error in check_env_vars({**inherited, **own})
            if error not in inherited_errors
        ]
    return errors


def check_env_vars(env_vars: Mapping[Any, Any]) -> list[str]:
    """What is wrong with one `env_vars` mapping: unknown names, values that are not text, bad values."""
    errors = unknown_variables(str(name) for name in env_vars)
    errors += [
        f"{name} must be text: put its value in quotes (YAML reads it as {type(value).__name__})"
        for name, value in env_vars.items()
        if not isinstance(value, str)
    ]
    texts = {str(name): value for name, value in env_vars.items() if isinstance(value, str)}
    try:
        EnvConfig.parse(texts)
    except EnvConfigError as error:
        errors += [str(problem) for problem in error.problems if is_decided_here(problem, env_vars)]
    return errors


def is_decided_here(problem: Problem, env_vars: Mapping[Any, Any]) -> bool:
    """Whether the value is known before the start: not one that Ray expands, nor one already refused."""
    value = env_vars.get(problem.variable, "")
    return isinstance(value, str) and not EXPANDED_BY_RAY.search(value)


def env_vars_of(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(options, "runtime_env"), "env_vars")


def mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigShapeError(f"`{key}` must be a mapping, got {type(value).__name__}")
    return value


def mapping_or_empty(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def list_of_mappings(parent: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = parent.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ConfigShapeError(f"`{key}` must be a list of mappings")
    return value


MERGE_TAG = "tag:yaml.org,2002:merge"  # `<<: *anchor`


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error; plain YAML keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE_TAG]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one mapping", node.start_mark
                )
        return super().construct_mapping(node, deep)
