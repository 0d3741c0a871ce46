"""`triptych plan`, `check` and `verify`: the tools of the same name, with the options that they have."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from serve_app.tools.command.described import command_of
from serve_app.tools.options import parser_of_check, parser_of_plan, parser_of_verify


def run_of(tool: str) -> Callable[[argparse.Namespace], int]:
    """The tool is imported when it runs."""

    def run(options: argparse.Namespace) -> int:
        code: int = importlib.import_module(f"serve_app.tools.{tool}").run(options)
        return code

    return run


plan = command_of(parser_of_plan(), run_of("plan"))
check = command_of(parser_of_check(), run_of("check_config"))
verify = command_of(parser_of_verify(), run_of("verify"))
