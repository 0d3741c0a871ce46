"""`triptych generate`: the words, files and numbers of the command line become a job, its files, a picture shown."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.tools.command.exits import CommandError, Exit, Interrupted
from serve_app.tools.command.server.options import json_option, key_option
from serve_app.tools.command.shown.progress import Progress, shown_progress
from serve_app.tools.command.shown.text import printable
from serve_app.tools.command.subcommands.asked import Asked, asked_options

if TYPE_CHECKING:
    from serve_app.tools.command.server.client import Content, Server

SHOW = ("auto", "no", "kitty", "iterm2", "sixel")
MOST_ASKED = 5  # times, each of which the server lets last a minute
PAUSE_S = 2.0
OF_A_PROCESS = ("dtype", "precision", "variant", "config_folder", "application", "name")


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@asked_options
@click.option("-o", "--output", metavar="FILE", help="Its suffix is the format; -: stdout. Default: by kind and seed.")
@click.option("--url", metavar="URL", help="A server; default: the model is loaded here, for this call.")
@key_option
@click.option("--application", metavar="NAME", help="Which one of MODEL, where that is a Serve config of several.")
@click.option("--name", metavar="NAME", help="Which one of its `models`, where the Serve config has several.")
@click.option("--dtype", metavar="NAME", help="Of the weights, where the model is loaded here.")
@click.option("--precision", metavar="NAME", help="Of the denoisers' weights, where the model is loaded here: int8 ...")
@click.option("--variant", metavar="NAME", help="Of the weight files, where the model is loaded here: fp16 ...")
@click.option("--config-folder", metavar="FOLDER", help="Settings and tokenizers of a .safetensors file.")
@click.option("--show", type=click.Choice(SHOW), default="auto", show_default=True, help="The picture in the terminal.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def generate(
    words: tuple[str, ...],
    output: str | None,
    url: str | None,
    api_key_file: Path | None,
    show: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a picture, a video or sound.

    MODEL is a folder, a .safetensors file, a name on the Hugging Face hub or a Serve config (FILE.yaml), which is
    loaded in a process of its own, with the stages that a server has. With --url it is the name of a served model, and
    may be left out.

    Ctrl-C cancels the job, on the server too.
    """
    own = {name: options.pop(name) for name in OF_A_PROCESS}
    asked = Asked(**options)
    model, prompt = model_and_prompt(words, is_served=url is not None)
    check(output, show, as_json, url, api_key_file, own, asked)
    started = time.monotonic()
    with (
        shown_progress(prompt or model or "generate", quiet) as progress,
        opened_server(url, api_key_file, model, own, asked, progress) as server,
    ):
        details = details_of(server, model if url else None, progress)
        body, route = asked.body(details, prompt, model if url else None, Path(output or "").suffix)
        job = made(server, route, body, progress)
        with told_how_to_fetch(job["id"]):
            files = files_of(server, job)
        shown = picture_of(server, job, files, show)
    paths = written(files, job, output)
    if shown:
        sys.stdout.buffer.write(shown)
        sys.stdout.flush()
    if as_json:
        click.echo(
            json.dumps({**document(job, files, paths), "seconds": round(time.monotonic() - started, 3)}, indent=2)
        )
    elif not quiet:
        for path, each in zip(paths, job["result"]["data"], strict=True):
            click.echo(f"{path}: seed {each['seed']}", err=True)


# --- the command line ------------------------------------------------------------------------------------------------


def model_and_prompt(words: Sequence[str], is_served: bool) -> tuple[str | None, str | None]:
    """One word is the prompt for a server, and the model where it is loaded here."""
    if len(words) > 2:
        raise click.UsageError(f"a model and a prompt are taken, got {len(words)} words: put the prompt into quotes")
    if is_served:
        return (words[0], words[1]) if len(words) == 2 else (None, words[0] if words else None)
    if not words:
        raise click.UsageError("name a MODEL and a PROMPT, or a server with --url")
    return words[0], words[1] if len(words) == 2 else None


def check(
    output: str | None,
    show: str,
    as_json: bool,
    url: str | None,
    api_key_file: Path | None,
    own: dict[str, Any],
    asked: Asked,
) -> None:
    """Raises UsageError for what would have no effect, or no place for what is made."""
    if output == "-" and (asked.number or 1) > 1:
        raise click.UsageError(f"-o - takes one file, -n asks for {asked.number}: name a file")
    if output == "-" and as_json:
        raise click.UsageError("-o - and --json would both write to stdout: choose one")
    if output == "-" and show not in ("auto", "no"):
        raise click.UsageError(f"-o - and --show {show} would both write to stdout: choose one")
    if show not in ("auto", "no") and not sys.stdout.isatty():
        raise click.UsageError(f"--show {show}: stdout is no terminal")
    if output and output != "-" and not Path(output).absolute().parent.is_dir():
        raise click.UsageError(f"-o {output}: there is no folder {Path(output).absolute().parent}")
    if output and Path(output).is_dir():
        raise click.UsageError(f"-o {output}: it is a folder: name a file in it")
    given = [f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None]
    if url is None and api_key_file is not None:
        raise click.UsageError("--api-key-file: of no effect without --url: the model is loaded here")
    if url is not None and given:
        raise click.UsageError(f"{', '.join(given)}: of no effect with --url, whose server has its model loaded")
    if url is not None:
        asked.check_for_server()


@contextlib.contextmanager
def opened_server(
    url: str | None, api_key_file: Path | None, model: str | None, own: dict[str, Any], asked: Asked, progress: Progress
) -> Iterator[Server]:
    if url is not None:
        from serve_app.tools.command.server.client import server_at

        with server_at(url, api_key_file) as server:
            yield server
        return
    from serve_app.tools.command.machine import device_here
    from serve_app.tools.command.server.here import Order, served_here

    assert model is not None
    is_config = is_serve_config(model)
    for option in ("application", "name"):
        if own[option] is not None and not is_config:
            raise click.UsageError(f"--{option} chooses one of a Serve config: {model} is none")
    named = {"config": str(Path(model).absolute())} if is_config else {"model": model}
    order = Order(**named, **own, loras=asked.files_of_loras(), device=None if is_config else device_here())
    progress.say(f"loading {model}")
    with served_here(order) as server:
        progress.say("loaded")
        yield server


def is_serve_config(model: str) -> bool:
    return Path(model).suffix in (".yaml", ".yml")


# --- the server ------------------------------------------------------------------------------------------------------


def details_of(server: Server, model: str | None, progress: Progress) -> dict[str, Any]:
    """GET /v1/models/{model}; of the first that is served where none is named. What a model takes is learned when it is
    first asked for: the server answers without it where that lasts."""
    from urllib.parse import quote

    from serve_app.tools.command.server.client import no_triptych

    name = model
    if name is None:
        served = server.get("v1/models").get("data")
        if not served:
            raise no_triptych(server.name, "a list of models")
        name = str(served[0]["id"])
    for _ in range(MOST_ASKED):
        details: dict[str, Any] = server.get(f"v1/models/{quote(name, safe='/:')}")
        if "asked" not in details:
            raise no_triptych(server.name, "the details of a model")
        if details["asked"] is not None:
            return details
        progress.say("waiting for the model to tell what it takes")
        time.sleep(PAUSE_S)
    hint = "try again, `triptych status` tells how far it is"
    raise CommandError(f"the model is not ready yet: {hint}", Exit.SERVERS_FAULT)


def made(server: Server, route: str, body: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The completed job. At Ctrl-C it is cancelled, then Interrupted is raised."""
    from serve_app.tools.command.server.following import begin, cancel, check_end, follow, path_of

    key, job_id = f"triptych-{uuid.uuid4()}", None
    try:
        job_id = begin(server, route, body, key)
        progress.say(f"asked: {job_id}")
        check_end(job_id, follow(server, job_id, progress))
        job: dict[str, Any] = server.get(path_of(job_id))
    except KeyboardInterrupt:
        if job_id is None:  # asked again with the same key, it is the same job, if there is one
            job_id = begin(server, route, body, key)
        raise Interrupted(f"interrupted: {cancel(server, job_id)}") from None
    for warning in job["warnings"]:
        progress.warn(warning["message"])
    return job


@contextlib.contextmanager
def told_how_to_fetch(job_id: str) -> Iterator[None]:
    """The job is made: what ends the command now says how its files are found."""
    hint = f"it is made, and `triptych jobs download {job_id}` fetches it where it was on a server"
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {hint}") from None
    except CommandError as error:
        raise CommandError(f"{error.message}; {hint}", error.exit, error.details) from error


def files_of(server: Server, job: dict[str, Any]) -> list[Content]:
    from serve_app.tools.command.server.following import path_of

    return [server.content(path_of(job["id"], "content"), index=i) for i in range(len(job["result"]["data"]))]


def picture_of(server: Server, job: dict[str, Any], files: Sequence[Content], show: str) -> bytes | None:
    """What shows the first file in the terminal: of a video some of its frames; None where nothing is to be shown."""
    from serve_app.tools.command.shown.terminal import protocol_here

    protocol: Any = None if show == "no" else protocol_here() if show == "auto" else show
    if protocol is None or job["kind"] not in ("image", "video"):
        return None
    from serve_app.tools.command.shown.pictures import picture_bytes

    try:
        picture = files[0]
        if not picture.content_type.startswith("image/"):
            picture = server.content(f"v1/videos/{job['id']}/content", variant="spritesheet")
        return picture_bytes(picture.data, protocol)
    except (CommandError, OSError, ValueError) as error:
        click.echo(printable(f"warning: the picture cannot be shown: {error}"), err=True)
        return None


# --- files -----------------------------------------------------------------------------------------------------------


def written(files: Sequence[Content], job: dict[str, Any], output: str | None) -> list[str]:
    """Where the files are now. Raises CommandError."""
    if output == "-":
        if len(files) != 1:
            raise click.UsageError(f"-o - takes one file, {len(files)} were made: name a file")
        sys.stdout.buffer.write(files[0].data)
        sys.stdout.flush()
        return ["-"]
    paths = places(output, job, len(files))
    for path, file in zip(paths, files, strict=True):
        try:
            path.write_bytes(file.data)
        except OSError as error:
            hint = f"`triptych jobs download {job['id']}` fetches it again, where the job was on a server"
            raise CommandError(f"{path} cannot be written: {error.strerror}; {hint}") from error
    return [str(path) for path in paths]


def places(output: str | None, job: dict[str, Any], count: int) -> list[Path]:
    """FILE, or FILE-1, FILE-2 ... of several; without -o names that are free, in this folder alone."""
    if output is not None:
        path = Path(output)
        return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]
    suffix = {"jpeg": "jpg"}.get(job["result"]["output_format"], job["result"]["output_format"])
    what = {"image": "picture", "audio": "sound"}.get(job["kind"], job["kind"])
    found: list[Path] = []
    for each in job["result"]["data"]:
        stem = in_a_name(f"{what}-{each['seed']}")
        endings = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        names = (Path(f"{stem}{ending}.{in_a_name(suffix)}") for ending in endings)
        found.append(next(name for name in names if not name.exists() and name not in found))
    return found


def in_a_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", text)


def document(job: dict[str, Any], files: Sequence[Content], paths: Sequence[str]) -> dict[str, Any]:
    result = job["result"]
    made_files = [
        {"path": path, "seed": each["seed"], "content_type": file.content_type, "bytes": len(file.data)}
        for path, each, file in zip(paths, result["data"], files, strict=True)
    ]
    told = {name: result[name] for name in ("model", "size", "steps", "timings", "usage", "warnings") if name in result}
    return {"job": job["id"], "kind": job["kind"], "files": made_files, **told}
