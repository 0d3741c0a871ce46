"""Check a Serve config file strictly, before anything starts: Serve itself accepts misspelt keys."""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve import Application
from ray.serve._private.build_app import build_app as serve_build_app
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.accelerators import ACCELERATORS, VARIABLE, bundles_problem, share_problem
from env_config.closest import hint
from env_config.secret import SecretReference
from env_config.section import EnvConfigError, read_environ
from env_config.serve_config import (
    EXPANDED_BY_RAY,
    UNREADABLE,
    check_all_env_vars,
    mapping_or_empty,
    read_serve_configs,
)
from env_config.variables import EnvConfig
from serve_app.app import AppArgs, deployments_of, located_place, model_args, ranks_of, shared_deployments
from serve_app.models.shared import useless
from serve_app.tools.check_policy import check_our_policy
from serve_app.tools.fits import cannot_fit
from serve_app.tools.options import parser_of_check

# Fields that Serve's schema types as a plain mapping and reads as one of these only after the start.
READ_AS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (ServeApplicationSchema, "autoscaling_policy"): AutoscalingPolicy,
}
OUR_POLICY = "serve_app.autoscaling:ReplicaRatio"
RUNTIME_ENV_KEYS = frozenset(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
RUNTIME_ENV_OWNERS = (ServeApplicationSchema, RayActorOptionsSchema)


def main(arguments: list[str]) -> int:
    return run(parser_of_check().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Checks the files; 1 when one of them has a problem. A warning is none. `options`: of `parser_of_check`."""
    problems = {file: check_config(file) for file in options.files}
    warnings = {file: [] if lines else cannot_fit(file, options.gpu) for file, lines in problems.items()}
    if options.json:
        files = [{"file": file, "problems": problems[file], "warnings": warnings[file]} for file in problems]
        print(json.dumps({"ok": not any(problems.values()), "files": files}, indent=2))
    else:
        for file, lines in problems.items():
            print("\n".join([*(lines or [f"{file}: ok"]), *warnings[file]]))
    return 1 if any(problems.values()) else 0


def check_config(file: Path | str) -> list[str]:
    """What is wrong with a Serve config or KubeRay RayService file, one sentence each; empty if nothing is.

    Looks at every key of Serve's schema, the builder and its `args`, the deployments' names, the `env_vars`.
    """
    try:
        configs = read_serve_configs(Path(file))
    except UNREADABLE as error:
        return [f"{file}: {error}"]
    problems = [problem for config in configs for problem in check_serve_config_schema(config)]
    return [f"{file}: {problem}" for problem in problems + check_all_env_vars(configs)]


def check_serve_config_schema(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the mapping that a Serve config file holds, its `env_vars` apart."""
    problems = unknown_keys(ServeDeploySchema, config, "") + refused_values(ServeDeploySchema, config, "")
    if "host" not in mapping_or_empty(config.get("http_options")):
        problems.append("http_options.host: must be written: Serve's own default is every interface, 0.0.0.0")
    applications = config.get("applications")
    for application in applications if isinstance(applications, list) else []:
        if isinstance(application, Mapping):
            problems += check_application(application)
    return problems


def check_application(application: Mapping[str, Any]) -> list[str]:
    """Build the application as Serve will, and hold the names under `deployments` against it."""
    where = f"applications[{application.get('name', 'default')}]"
    import_path, args = application.get("import_path"), application.get("args") or {}
    if not isinstance(import_path, str) or not isinstance(args, Mapping):
        return []  # refused by Serve's schema
    try:
        builder = import_builder(import_path)
        model = args_model(builder)
    except BuilderError as error:
        return [f"{where}.import_path: {import_path!r}: {error}"]
    problems = unknown_keys(model, args, f"{where}.args") or refused_values(model, args, f"{where}.args")
    if problems:
        return problems
    try:
        values = model.model_validate(args)
        known = deployment_names(builder(values))
    except ValueError as error:
        return [f"{where}.args: {error}"]
    deployments = application.get("deployments")
    deployments = [mapping_or_empty(each) for each in (deployments if isinstance(deployments, list) else [])]
    names = [deployment.get("name") for deployment in deployments]
    problems += [
        f"{where}.deployments: no deployment is named {name!r}{hint(name, known)}"
        for name in names
        if name not in known
    ]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    problems += [f"{where}.deployments: {name!r} stands there twice" for name in twice]
    problems += check_adapters(values, f"{where}.args")
    problems += check_shared_deployments(values, f"{where}.args")
    problems += check_secrets(values, application, deployments, f"{where}.args")
    problems += check_accelerators(values, application, deployments, where)
    problems += check_bundles(values, application, deployments, where)
    return problems + check_autoscaling(application, deployments, where)


def check_adapters(args: BaseModel, where: str) -> list[str]:
    """LoRAs, and places for them, that are not there; absolute ones are looked for where the folder around them is."""
    if not isinstance(args, AppArgs):
        return []
    paths = [
        (f"{place_of(args, model, where)}.adapters.{name}.path", each.path)
        for model in args.entries
        for name, each in model_args(args, model).adapters.items()
    ]
    paths += [(f"{where}.adapter_places", located_place(place)) for place in args.adapter_places]
    return [f"{place}: there is no file or folder {path!r} here" for place, path in paths if is_missing(path)]


def check_shared_deployments(args: BaseModel, where: str) -> list[str]:
    """Models that share nothing where `share` names them, as far as their files are here."""
    if not isinstance(args, AppArgs) or not isinstance(args.share, tuple):
        return []
    models = {name: model_args(args, name) for name in args.entries}
    return [f"{where}.{sentence}" for sentence in useless(models, shared_deployments(args))]


def place_of(args: AppArgs, model: str, where: str) -> str:
    """Where the arguments of one model stand."""
    return join(where, "models", model) if args.models else where


def is_missing(path: str) -> bool:
    file = Path(path).expanduser()
    return is_local(path) and not file.exists() and (not file.is_absolute() or file.parent.exists())


def is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or (path.endswith(".safetensors") and not path.startswith("s3://"))


def check_accelerators(
    args: BaseModel, application: Mapping[str, Any], deployments: list[Mapping[str, Any]], where: str
) -> list[str]:
    """What the replicas of the stages would refuse at their start: no share of a device, or more than one."""
    problems: list[str] = []
    if not isinstance(args, AppArgs):
        return problems
    shared = shared_deployments(args)
    places = {name: model for model in args.entries for name in deployments_of(args, model, shared)}
    for name, model in places.items():
        options = next((each.get("ray_actor_options") for each in deployments if each.get("name") == name), None)
        target = target_device_of(application, mapping_or_empty(options))
        share = ACCELERATORS[target].asked(mapping_or_empty(options)) if target in ACCELERATORS else 0
        problem = share_problem(target, share) if isinstance(share, int | float) else None  # else: Serve's schema
        problems += [f"{where}.deployments[{name}].{problem}"] if problem else []
        if args.entries[model].fence_device_memory and target and target not in ACCELERATORS:
            place = place_of(args, model, f"{where}.args")
            problems.append(f"{place}.fence_device_memory is true: with {VARIABLE}={target} it must be false")
    return problems


def check_bundles(
    args: BaseModel, application: Mapping[str, Any], deployments: list[Mapping[str, Any]], where: str
) -> list[str]:
    """Each rank of a denoiser or of a VAE has a bundle of its replica's placement group."""
    problems: list[str] = []
    asked = [ranks_of(args, model).items() for model in args.entries] if isinstance(args, AppArgs) else []
    for name, (setting, num_ranks) in (each for of_model in asked for each in of_model):
        options: Mapping[str, Any] = next((each for each in deployments if each.get("name") == name), {})
        bundles, place = options.get("placement_group_bundles") or [], f"{where}.deployments[{name}]"
        if num_ranks == 1:
            if len(bundles) > 1:
                without = f"without `{setting}` a replica" if setting else "a replica that only encodes"
                instead = f", or set `{setting}` in args" if setting else ": text encoders are not split over ranks"
                problems.append(
                    f"{place}.placement_group_bundles has {len(bundles)} bundles, and {without} uses one: leave them "
                    f"out{instead}"
                )
            continue
        target = target_device_of(application, mapping_or_empty(options.get("ray_actor_options")))
        problem = bundles_problem(target, bundles, num_ranks, setting)
        problems += [f"{place}.{problem}"] if problem else []
    return problems


def target_device_of(application: Mapping[str, Any], ray_actor_options: Mapping[str, Any]) -> str:
    """As the replica will read it; empty for a value that is known only on its node, or that is refused elsewhere.

    Ray may have been started with the variable: where the config has none, this process's own counts.
    """
    env_vars = {name: value for name, value in read_environ().items() if name == VARIABLE}
    for owner in (application, ray_actor_options):
        env_vars |= mapping_or_empty(mapping_or_empty(owner.get("runtime_env")).get("env_vars"))
    target = str(env_vars.get(VARIABLE, ""))
    if EXPANDED_BY_RAY.search(target):
        return ""
    try:
        return EnvConfig.parse({VARIABLE: target} if target else {}).runtime.target_device
    except EnvConfigError:
        return ""


def check_secrets(
    args: BaseModel, application: Mapping[str, Any], deployments: list[Mapping[str, Any]], where: str
) -> list[str]:
    """A secret that `args` read from a variable must not stand in the config, as the value of that variable."""
    owners = [application, *(mapping_or_empty(each.get("ray_actor_options")) for each in deployments)]
    env_vars = [mapping_or_empty(mapping_or_empty(owner.get("runtime_env")).get("env_vars")) for owner in owners]
    shown = {name for each in env_vars for name, value in each.items() if not EXPANDED_BY_RAY.search(str(value))}
    return [
        f"{place}: the variable {reference.env} has its value in runtime_env.env_vars, which Ray Serve shows: "
        "set it where Ray is started"
        for place, reference in secret_references(args, where)
        if reference.env in shown
    ]


def secret_references(args: BaseModel, where: str) -> Iterator[tuple[str, SecretReference]]:
    for name, value in args:
        if isinstance(value, SecretReference):
            yield join(where, name), value
        elif isinstance(value, BaseModel):
            yield from secret_references(value, join(where, name))


def check_autoscaling(application: Mapping[str, Any], deployments: list[Mapping[str, Any]], where: str) -> list[str]:
    """Make our policy as Serve's controller would, which tells nobody but its log when that fails."""
    configs = {
        f"{where}.deployments[{each.get('name')}].autoscaling_config": each["autoscaling_config"]
        for each in deployments
        if isinstance(each.get("autoscaling_config"), Mapping)
    }
    problems = [
        f"{place}.policy: {OUR_POLICY} is for `autoscaling_policy` of the application: it decides for all stages"
        for place, config in configs.items()
        if is_our_policy(config.get("policy"))
    ]
    if not is_our_policy(application.get("autoscaling_policy")):
        return problems
    place = f"{where}.autoscaling_policy"
    if not configs:
        problems.append(f"{place}: no deployment has an autoscaling_config, so none would scale")
    scaling = [each for each in deployments if isinstance(each.get("autoscaling_config"), Mapping)]
    problems += check_our_policy(
        application["autoscaling_policy"].get("policy_kwargs") or {}, scaling, f"{place}.policy_kwargs"
    )
    return problems + [
        f"{place}.{delay}: must be 0: the policy itself starts replicas at once and takes them away after cooldown_s"
        for place, config in configs.items()
        for delay in ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
        if config.get(delay, AutoscalingConfig.model_fields[delay].default) not in (0, None)
    ]


def is_our_policy(policy: Any) -> bool:
    return str(mapping_or_empty(policy).get("policy_function")).replace(":", ".") == OUR_POLICY.replace(":", ".")


def deployment_names(application: Application) -> list[str]:
    return [deployment.name for deployment in serve_build_app(application, name="").deployments]


class BuilderError(ValueError):
    """`import_path` does not name an application builder with typed arguments."""


def import_builder(import_path: str) -> Callable[..., Any]:
    module_name, _, name = import_path.rpartition(":" if ":" in import_path else ".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BuilderError(f"{error}") from error
    builder: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(builder):
        raise BuilderError(f"{module_name} has no function {name}{hint(name, vars(module))}")
    return builder


def args_model(builder: Callable[..., Any]) -> type[BaseModel]:
    """The type of the builder's one parameter, read as Serve reads it: a type written as text is none."""
    annotations = [parameter.annotation for parameter in inspect.signature(builder).parameters.values()]
    match annotations:
        case [type() as model] if issubclass(model, BaseModel):
            return model
    raise BuilderError("must take one argument whose type is a pydantic model, not its name as text")


def unknown_keys(model: type[BaseModel], values: Mapping[str, Any], where: str) -> list[str]:
    """Every key of `values`, at any depth, that `model` does not have, with the closest name it has.

    Says also what is wrong with the values of the mappings that validating `model` does not look into.
    """
    known = {field.alias or name: name for name, field in model.model_fields.items()}
    names = {key: known.get(key, key) for key in values} if takes_any_key(model) else known
    problems = [f"{join(where, key)}: unknown key{hint(key, known)}" for key in values if key not in names]
    for key in [key for key in values if key in names]:
        annotation = annotation_of(model, names[key])
        for nested, mapping, place in nested_models(annotation, values[key], join(where, key)):
            problems += unknown_keys(nested, mapping, place)
            if allows_plain_mapping(annotation):
                problems += refused_values(nested, mapping, place)
    if model in RUNTIME_ENV_OWNERS:
        problems += unknown_runtime_env_keys(mapping_or_empty(values.get("runtime_env")), where)
    return problems


def unknown_runtime_env_keys(runtime_env: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{join(where, 'runtime_env', key)}: unknown key{hint(key, RUNTIME_ENV_KEYS)}"
        for key in runtime_env
        if key not in RUNTIME_ENV_KEYS
    ]


def refused_values(model: type[BaseModel], values: Mapping[str, Any], where: str) -> list[str]:
    """What pydantic says of `values`; keys it does not know are left to `unknown_keys`."""
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        return [
            f"{join(where, *entry['loc'])}: {entry['msg'].removeprefix('Value error, ')}"
            for entry in error.errors()
            if entry["type"] != "extra_forbidden"
        ]
    except (ImportError, AttributeError, TypeError) as error:  # Serve imports the functions named here
        return [f"{where or 'the config'}: {error}"]
    return []


def takes_any_key(model: type[BaseModel]) -> bool:
    return model.model_config.get("extra") == "allow" and "__pydantic_extra__" in vars(model).get("__annotations__", {})


def annotation_of(model: type[BaseModel], field: str) -> Any:
    if field not in model.model_fields:
        return get_args(get_type_hints(model, include_extras=True)["__pydantic_extra__"])[1]
    annotation = model.model_fields[field].annotation
    return annotation | READ_AS[model, field] if (model, field) in READ_AS else annotation


def nested_models(annotation: Any, value: Any, where: str) -> Iterator[tuple[type[BaseModel], Mapping[str, Any], str]]:
    """The mappings in `value` that are read as pydantic models, each with its model and its place.

    An item of a list is called by its `name`, if it has one.
    """
    kind, arguments = get_origin(annotation), get_args(annotation)
    if is_model(annotation) and isinstance(value, Mapping):
        yield annotation, value, where
    elif kind is Annotated:
        yield from nested_models(arguments[0], value, where)
    elif kind in (list, tuple) and arguments and isinstance(value, list):
        for index, item in enumerate(value):
            yield from nested_models(arguments[0], item, f"{where}[{mapping_or_empty(item).get('name', index)}]")
    elif kind is dict and arguments and isinstance(value, Mapping):
        for key, item in value.items():
            yield from nested_models(arguments[1], item, join(where, key))
    elif kind in (Union, UnionType):
        for choice in arguments:
            yield from nested_models(choice, value, where)


def allows_plain_mapping(annotation: Any) -> bool:
    """Whether pydantic may take a mapping as it is, although a model stands beside it: `dict | Model`."""
    choices = [annotation, *get_args(annotation)]
    return any(choice is dict or get_origin(choice) is dict for choice in choices)


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def join(*parts: object) -> str:
    return ".".join(str(part) for part in parts if part != "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
