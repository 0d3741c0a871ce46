"""`triptych`: its subcommands as a table, each imported when it is used; errors in one line, never a traceback."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from serve_app.tools.command.exits import CommandError, Exit, Interrupted
from serve_app.tools.command.shown.text import printable

ROOM = "serve_app.tools.command.subcommands"


@dataclass(frozen=True)
class Row:
    """A subcommand: where it is, and its line in the help."""

    module: str
    name: str
    help: str


COMMANDS = {
    "serve": Row("serving", "serve", "Serve a model, or a Serve config, on this machine."),
    "generate": Row("generating", "generate", "Make a picture, a video or sound."),
    "status": Row("status", "status", "What a server does: stages, replicas, queue, batches."),
    "jobs": Row("jobs", "jobs", "The jobs of a server: list, show, watch, cancel, download."),
    "loras": Row("loras", "loras", "The LoRAs of a server: list, add, remove."),
    "models": Row("models", "models", "What a server serves, and what a model takes."),
    "plan": Row("tools", "plan", "What a model needs on a GPU, and what would be chosen."),
    "check": Row("tools", "check", "Check Serve config files."),
    "verify": Row("tools", "verify", "Hold the split of a checkpoint against its unsplit pipeline."),
    "completion": Row("completion", "completion", "The completion script of a shell."),
}


class Commands(click.Group):
    """The rows of COMMANDS; the help and the completion of their names import none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        row = COMMANDS.get(cmd_name)
        if row is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"{ROOM}.{row.module}"), row.name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from env_config.closest import did_you_mean

            hint = did_you_mean(args[0], COMMANDS, f"known: {', '.join(COMMANDS)}")
            raise click.UsageError(f"there is no command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.help) for name, row in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=row.help) for name, row in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from env_config.own_version import own_version

        click.echo(f"triptych {own_version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=show_version, help="Show it.")
def triptych() -> None:
    """Serve diffusion models, and make pictures, videos and sound with them."""


def main() -> NoReturn:
    """The console script. SIGTERM is as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code; whatever a user can have done wrong is told in a line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack letters
            stream.reconfigure(errors="backslashreplace")
    try:
        code = triptych.main(list(arguments), prog_name="triptych", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.USAGE
    except (CommandError, click.ClickException, click.Abort, KeyboardInterrupt) as error:
        return _told(_as_command_error(error), "--json" in arguments)
    except BrokenPipeError:  # who read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return code if isinstance(code, int) else Exit.OK


def _as_command_error(error: BaseException) -> CommandError:
    if isinstance(error, CommandError):
        return error
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "triptych"
        return CommandError(f"{error.format_message()}\n`{path} --help` tells what it takes.", Exit.USAGE)
    if isinstance(error, click.ClickException):
        return CommandError(error.format_message())
    return Interrupted("interrupted")


def _told(error: CommandError, as_json: bool) -> int:
    """The document is a line, since `status --watch --json` writes a document a line."""
    if as_json:
        print(json.dumps(error.document()))
    print(f"triptych: {printable(error.message)}", file=sys.stderr)
    return error.exit
