"""Hold the split against the unsplit pipeline: one small request through both, with a verdict for each stage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.messages import StageName
from deployments.replicas.table import BETWEEN_MODELS, REPLICAS, processes_of
from deployments.verify.asked import Asked
from deployments.verify.process import REPORT, CheckOrder, run_check
from deployments.verify.verdict import Report
from env_config.children import environment_of_children
from env_config.serve_config import env_vars_of, mapping, read_serve_configs
from serve_app.app import PLACEMENTS, AppArgs, model_args
from serve_app.tools.check_config import check_config
from serve_app.tools.options import parser_of_verify


class MisuseError(ValueError):
    """The command line, or the file that it names, is wrong."""


def main(arguments: list[str]) -> int:
    return run(parser_of_verify().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """`options` are those of `parser_of_verify`."""
    try:
        args, variables = served(options, (*SERVED, "precision"))
        order = CheckOrder(model=model_args(args), processes=processes(args), asked=asked(options))
    except (MisuseError, ValidationError) as error:
        print(told(error), file=sys.stderr)
        return 2
    report = run_check(order, environment_of_children() | variables)
    print(as_json(report) if options.json else "\n".join(report.lines()))
    return 0 if report.passed else 1


SERVED = ("model", "dtype", "variant", "config_folder", "placement")  # options that are arguments of the application


def served(options: argparse.Namespace, names: Sequence[str] = SERVED) -> tuple[AppArgs, dict[str, str]]:
    """What would be served, and with which variables beside those of this process. Raises MisuseError."""
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.config is None:
        if options.model is None:
            raise MisuseError("name a MODEL, or a Serve config with --config FILE")
        for option in ("application", "name"):
            if getattr(options, option) is not None:
                raise MisuseError(f"--{option} chooses one of a file: name it with --config FILE")
        return AppArgs.model_validate(given), {}
    if problems := check_config(options.config):
        raise MisuseError("\n".join(problems))
    application = chosen(options.config, options.application, options.name)
    args = AppArgs.model_validate({**(application.get("args") or {}), **given})
    return args, variables_of(application, PLACEMENTS[args.placement][1])


def chosen(file: Path, name: str | None, model: str | None = None) -> Mapping[str, Any]:
    """The application of the file that has this name, or the only one, with one model: that of this name.

    Raises MisuseError.
    """
    return with_one_model(application_of(file, name), model)


def with_one_model(application: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """As if the application served but the model of this name. Raises MisuseError."""
    models = mapping(mapping(application, "args"), "models")
    if not models and name is None:
        return application
    if name is None or name not in models:
        raise MisuseError(
            f"the application has the models {', '.join(models)}: choose with --name NAME"
            if models
            else "--name chooses one of `models`: the application has only one"
        )
    deployments = [
        {**each, "name": kind}
        for each in application.get("deployments") or []
        for kind, _, served in [str(each.get("name")).partition("-")]
        if kind in REPLICAS and name in served.split(BETWEEN_MODELS)
    ]
    return {**application, "args": {**models[name], "model_name": name}, "deployments": deployments}


def application_of(file: Path, name: str | None) -> Mapping[str, Any]:
    applications = [each for config in read_serve_configs(file) for each in config["applications"]]
    names = [application.get("name", "default") for application in applications]
    if name is None and len(applications) == 1:
        return dict(applications[0])
    if name not in names:
        raise MisuseError(f"{file} has the applications {', '.join(names) or 'none'}: choose with --application NAME")
    return dict(applications[names.index(name)])


def variables_of(application: Mapping[str, Any], denoiser: str) -> dict[str, str]:
    """Of the deployment that denoises, over its application's; what Ray expands on its nodes is expanded here."""
    deployments = [each for each in application.get("deployments") or [] if each.get("name") == denoiser]
    own = env_vars_of(mapping(deployments[0], "ray_actor_options")) if deployments else {}
    return {name: os.path.expandvars(value) for name, value in {**env_vars_of(application), **own}.items()}


def processes(args: AppArgs) -> tuple[tuple[StageName, ...], ...]:
    return processes_of(PLACEMENTS[args.placement])


def asked(options: argparse.Namespace) -> Asked:
    width, height = options.size or (None, None)
    arguments = dict(options.argument)
    return Asked(prompt=options.prompt, width=width, height=height, steps=options.steps, arguments=arguments)


def as_json(report: Report) -> str:
    content = {"passed": report.passed, "conclusion": report.conclusion, **REPORT.dump_python(report, mode="json")}
    return json.dumps(content, indent=2)


def told(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    lines = [
        f"{'.'.join(map(str, e['loc'])) or 'args'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
