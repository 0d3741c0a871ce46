"""`triptych completion`: the script by which a shell completes the command."""

from __future__ import annotations

import json

import click

PLACES = {
    "bash": "~/.local/share/bash-completion/completions/triptych",
    "zsh": "a folder of $fpath, as _triptych",
    "fish": "~/.config/fish/completions/triptych.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(PLACES)))
@click.option("--json", "as_json", is_flag=True, help="The script in a JSON document.")
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell.

    Once for a session: source <(triptych completion bash). For all: write it to
    ~/.local/share/bash-completion/completions/triptych (bash), into a folder of $fpath as _triptych (zsh), to
    ~/.config/fish/completions/triptych.fish (fish).
    """
    script = script_of(shell)
    click.echo(json.dumps({"shell": shell, "place": PLACES[shell], "script": script}) if as_json else script)


def script_of(shell: str) -> str:
    from click.shell_completion import get_completion_class

    from serve_app.tools.command.main import triptych

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(triptych, {}, "triptych", "_TRIPTYCH_COMPLETE").source()
