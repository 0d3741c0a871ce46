"""A subcommand from the parser of a tool, which stays the one place where its options stand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import click


def command_of(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], help: str | None = None
) -> click.Command:
    """It calls `run` with what the parser would have made of the command line."""

    def call(**values: Any) -> int:
        return run(argparse.Namespace(**values))

    return click.Command(None, callback=call, params=params_of(parser), help=help or parser.description)


def params_of(parser: argparse.ArgumentParser) -> list[click.Parameter]:
    """An option or argument of click for each of argparse's, but its help."""
    actions = [action for action in parser._actions if action.dest != "help"]
    return [_option(action) if action.option_strings else _argument(action) for action in actions]


class Typed(click.ParamType[Any, Any]):
    """A value by a function of argparse's kind."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            self.fail(str(error), param, ctx)


def _option(action: argparse.Action) -> click.Option:
    names = [*action.option_strings, action.dest]
    if action.nargs == 0:
        return click.Option(names, is_flag=True, help=action.help)
    is_repeated = isinstance(action, argparse._AppendAction)
    default = None if is_repeated else action.default
    return click.Option(
        names,
        type=_type(action),
        required=action.required,
        multiple=is_repeated,
        default=default,
        metavar=None if action.choices else _metavar(action),
        help=action.help,
    )


def _argument(action: argparse.Action) -> click.Argument:
    return click.Argument(
        [action.dest],
        type=_type(action),
        required=action.nargs != "?",
        nargs=-1 if action.nargs == "+" else 1,
        metavar={"+": "{}...", "?": "[{}]"}.get(str(action.nargs), "{}").format(_metavar(action)),
    )


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def _type(action: argparse.Action) -> click.ParamType[Any, Any] | None:
    if action.choices:
        return click.Choice([str(each) for each in action.choices])
    read: Any = action.type
    return Typed(_metavar(action), read) if read else None
