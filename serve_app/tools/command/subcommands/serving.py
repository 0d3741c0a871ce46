"""`triptych serve`: a config is started as it is; of a MODEL a plan is made and shown first, and a config written."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.tools.command.described import Typed, params_of
from serve_app.tools.command.exits import CommandError, Exit
from serve_app.tools.command.machine import cards_here, lines_of_driver
from serve_app.tools.command.subcommands.generating import is_serve_config
from serve_app.tools.options import add_wishes, gpu

if TYPE_CHECKING:
    from serve_app.tools.launch import Address

FOLDER = Path("outputs")
ONLY_WITH_A_CARD = ("gpus", "size", "num_frames", "precision", "max_batch_size", "parallel")


def wishes() -> list[click.Parameter]:
    """Those of `triptych plan`."""
    parser = argparse.ArgumentParser()
    add_wishes(parser, gpus=None)
    return params_of(parser)


@dataclass(frozen=True)
class Written:
    """The config that is to be served: its text, what is said of it, and the plan, where there is one."""

    text: str
    lines: list[str]
    plan: dict[str, Any] | None = None


@click.command()
@click.argument("what", metavar="MODEL|CONFIG.yaml")
@click.option("--gpu", type=Typed("SIZE|NAME", gpu), help="24GB, H100, L40S ...; default: the GPUs of this machine.")
@click.option("--host", metavar="ADDRESS", help="Where a MODEL listens; default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65_535), metavar="N", help="Where a MODEL listens; default: 8000.")
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The config of a MODEL; default: outputs/serve_NAME.yaml.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be served, write and start nothing.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout when it is ready; all else on stderr."
)
def serve(
    what: str, host: str | None, port: int | None, write: Path | None, dry_run: bool, as_json: bool, **wished: Any
) -> int:
    """Serve a model, or a Serve config, on this machine until Ctrl-C.

    A CONFIG.yaml is started as `make serve CONFIG=` does. Of a MODEL (a folder, a .safetensors file, a name on the
    Hugging Face hub) the memory plan is made for --gpu, or for the GPUs of this machine, and shown; its config is
    written, to be changed and served again, and started. On a machine without a GPU the model is served on the CPU.
    """
    if is_serve_config(what):
        of_models = {"host": host, "port": port, "write": write, **wished}
        return serve_config(Path(what), of_models, dry_run, as_json)
    made = config_of(what, host or "127.0.0.1", port or 8000, wished)
    click.echo("\n".join(made.lines), err=as_json)
    file = write or FOLDER / f"serve_{name_of(what)}.yaml"
    if dry_run:
        told = {"config": made.text, "file": str(file), "started": False, "plan": made.plan}
        click.echo(
            json.dumps(told, indent=2) if as_json else f"\nWould be written to {file}:\n\n{without_comment(made.text)}"
        )
        return Exit.OK
    kept = save(file, made.text)
    said = f"\nThe config is {file}; `triptych serve {file}` serves it again."
    click.echo(said + (f" What stood there is {kept} now." if kept else ""), err=as_json)
    return start(file, as_json)


def serve_config(file: Path, of_models: dict[str, Any], dry_run: bool, as_json: bool) -> int:
    given = [name for name, value in of_models.items() if value is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{options}: for a MODEL; {file} says it itself")
    if not dry_run:
        return start(file, as_json)
    from serve_app.tools import check_config

    return check_config.run(argparse.Namespace(files=[str(file)], gpu=None, json=as_json))


def start(file: Path, as_json: bool) -> int:
    """Until Ctrl-C. As `python -m serve_app.tools.launch` does; with `as_json` its lines go to stderr."""
    from serve_app.tools import launch

    if not as_json:
        return launch.run(file)
    answer = sys.stdout

    def tell_ready(address: Address) -> None:
        print(
            json.dumps({"url": address.url, "config": str(file), "log": str(launch.LOG_FILE)}), file=answer, flush=True
        )

    with contextlib.redirect_stdout(sys.stderr):
        return launch.run(file, tell_ready)


# --- the config of a model -------------------------------------------------------------------------------------------


def config_of(model: str, host: str, port: int, wished: dict[str, Any]) -> Written:
    """By a plan for the card that is named or found, else for the CPU."""
    card, gpus, said = wished["gpu"], wished["gpus"], list[str]()
    if card is None and lines_of_driver():
        cards = cards_here()
        if gpus is not None and gpus > len(cards):
            raise click.UsageError(f"--gpus {gpus}: this machine has {len(cards)}; for another one name its --gpu")
        card, gpus = min(cards, key=lambda each: each.num_bytes), gpus or len(cards)
        which = "these" if gpus == len(cards) else f"{gpus} of these"
        said = [f"This machine has {', '.join(each.name for each in cards)}: the plan is for {which}.", ""]
    if card is None:
        return on_cpu(model, host, port, wished)
    return planned(model, host, port, {**wished, "gpu": card, "gpus": gpus or 1}, said)


def planned(model: str, host: str, port: int, wished: dict[str, Any], said: list[str]) -> Written:
    from pydantic import ValidationError

    from serve_app.tools import plan
    from serve_app.tools.verify import MisuseError, told

    no_config = {"config": None, "application": None, "name": None}
    options = argparse.Namespace(model=model, json=False, write=Path(), **no_config, **wished)
    try:
        plan.check_that_it_can_be_written(options)
        made = plan.planned(options)
    except (MisuseError, ValidationError) as error:
        raise CommandError(told(error), Exit.USAGE) from None
    except plan.NotPlannedError as error:
        raise CommandError(str(error)) from None
    lines = [*said, *made.lines]
    if made.plan.choice is None:
        raise CommandError("\n".join(["nothing fits:", *lines]))
    return Written(made.config(host, port), lines, json.loads(plan.as_json(made.measured, made.plan)))


def on_cpu(model: str, host: str, port: int, wished: dict[str, Any]) -> Written:
    without = [name for name in ONLY_WITH_A_CARD if wished[name] is not None]
    if without:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in without)
        raise click.UsageError(f"{options}: for a plan, and no GPU was found here: name one with --gpu")
    from pydantic import ValidationError

    from serve_app.app import AppArgs
    from serve_app.tools.planned_config import cpu_config
    from serve_app.tools.verify import SERVED, told

    given = {name: wished[name] for name in SERVED if wished.get(name) is not None}
    try:
        args = AppArgs.model_validate({**given, "model": model})
    except ValidationError as error:
        raise CommandError(told(error), Exit.USAGE) from None
    lines = [f"{model} on the CPU: no GPU was found here (nvidia-smi), and none is named with --gpu."]
    return Written(cpu_config(args, lines, host, port), lines)


def name_of(model: str) -> str:
    """For a file: the last part of a path or of a name on the hub."""
    return Path(model.rstrip("/")).name.removesuffix(".safetensors") or "model"


def without_comment(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def save(file: Path, text: str) -> Path | None:
    """Where another text that stood there, perhaps changed by hand, is kept."""
    kept = file.with_name(f"{file.name}~")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_other = file.is_file() and file.read_bytes() != text.encode()
        if is_other:
            file.replace(kept)
        file.write_text(text, encoding="utf-8")
        return kept if is_other else None
    except OSError as error:
        raise CommandError(f"{file} cannot be written ({error.strerror}): name another with --write FILE") from error


serve.params[2:2] = wishes()
