"""What a request asks for: options of the command line, and the body that they become for a served model."""

from __future__ import annotations

import base64
import json
import mimetypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

FORMATS = {"jpg": "jpeg", "tif": "tiff"}  # suffixes that are not the format's name
ADAPTER_SUFFIX = ".safetensors"


def asked_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options whose values make an Asked."""
    options = (
        click.option("--lora", "loras", multiple=True, metavar="NAME[:SCALE]",
                     help="A LoRA of the server or config, or a .safetensors FILE where the model is loaded here."),
        click.option("--steps", type=click.IntRange(1), metavar="N", help="num_inference_steps."),
        click.option("--seed", type=click.IntRange(0), metavar="N", help="Default: drawn, and told."),
        click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels; default: the model's or the server's own."),
        click.option("-n", "--number", type=click.IntRange(1), metavar="N", help="How many; default: 1."),
        click.option("--image", "images", multiple=True, metavar="FILE", help="To begin with; may be repeated."),
        click.option("--mask", metavar="FILE", help="White where it may change."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                     help="Any other argument of the model, as JSON or text; @FILE is a file. May be repeated."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Asked:
    """The options as they were given."""

    loras: tuple[str, ...] = ()
    steps: int | None = None
    seed: int | None = None
    size: str | None = None
    number: int | None = None
    images: tuple[str, ...] = ()
    mask: str | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError for what is wrong whatever the model is."""
        if self.size is not None and not re.fullmatch(r"\d+x\d+", self.size):
            raise click.UsageError(f"--size must be like 512x512, got {self.size!r}")
        for given in (*self.images, *([self.mask] if self.mask else [])):
            if not Path(given).is_file():
                raise click.UsageError(f"there is no file {given!r}")
        self._settings()
        self._loras()

    def files_of_loras(self) -> dict[str, str]:
        """The files that are LoRAs, by the names that requests give them. Raises UsageError for two of one name."""
        files = dict[str, str]()
        for file in [name for name, _ in map(lora, self.loras) if is_file(name)]:
            path = str(Path(file).absolute())
            if files.setdefault(name_of_lora(file), path) != path:
                raise click.UsageError(f"--lora: two files are called {name_of_lora(file)}: rename one")
        return files

    def check_for_server(self) -> None:
        """Raises UsageError for files of LoRAs, which no request can bring along."""
        for name, _ in map(lora, self.loras):
            if name.endswith(ADAPTER_SUFFIX):
                raise click.UsageError(
                    f"--lora {name}: of no effect with --url, whose LoRAs `triptych loras list` tells"
                )

    def body(
        self, details: Mapping[str, Any], prompt: str | None, model: str | None, suffix: str
    ) -> tuple[dict[str, Any], str]:
        """The body, and the route that takes it, by what the server says of its model (GET /v1/models/{id}).

        Raises UsageError for what has no field there.
        """
        asked, body = details["asked"], dict[str, Any]()
        plain = {"model": model, "prompt": prompt, "n": self.number, "seed": self.seed, "size": self.size}
        body |= {name: value for name, value in plain.items() if value is not None}
        if self.steps is not None:
            body["num_inference_steps"] = self.steps
        if suffix:
            body["output_format"] = format_of(suffix, asked["output_formats"])
        if self.loras:
            body["loras"] = self._loras()
        if self.images:
            files = [data_url(each) for each in self.images]
            body[field_of("image", "--image", details)] = files[0] if len(files) == 1 else files
        if self.mask:
            body[field_of("mask_image", "--mask", details)] = data_url(self.mask)
        settings = self._settings()
        if twice := [name for name in settings if name in body]:
            raise click.UsageError(f"--set {twice[0]}: it is given by an option of its own too")
        return body | settings, asked["route"]

    def _loras(self) -> list[dict[str, Any]]:
        """As the field `loras` takes them; without a scale it is the LoRA's own."""
        return [
            {"name": name_of_lora(name)} | ({} if scale is None else {"scale": scale})
            for name, scale in map(lora, self.loras)
        ]

    def _settings(self) -> dict[str, Any]:
        return dict(map(setting, self.settings))


def lora(text: str) -> tuple[str, float | None]:
    """NAME or NAME:SCALE."""
    name, colon, scale = text.rpartition(":")
    if not colon:
        return text, None
    try:
        return name, float(scale)
    except ValueError:
        raise click.UsageError(f"--lora must be like NAME or NAME:0.8, got {text!r}") from None


def is_file(name: str) -> bool:
    if not name.endswith(ADAPTER_SUFFIX):
        return False
    if not Path(name).is_file():
        raise click.UsageError(f"--lora: there is no file {name!r}")
    return True


def name_of_lora(name: str) -> str:
    """A file is called by its name, as far as that is one that a request may give."""
    if not name.endswith(ADAPTER_SUFFIX):
        return name
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(name).stem).lstrip("._-")[:64] or "lora"


def setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise click.UsageError(f"--set must be like guidance_scale=3.5, got {text!r}")
    if value.startswith("@"):
        if not Path(value[1:]).is_file():
            raise click.UsageError(f"--set {name}: there is no file {value[1:]!r}")
        return name, data_url(value[1:])
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def data_url(file: str) -> str:
    """The file as JSON carries it. Raises UsageError."""
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read: {error.strerror}") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def field_of(argument: str, option: str, details: Mapping[str, Any]) -> str:
    """The field of the body that stands for the argument of the model's call."""
    arguments = details["arguments"] or []
    for each in arguments:
        if each["name"] == argument:
            return str(each["field"])
    files = [each["field"] for each in arguments if each["media"]]
    hint = f"; files that it takes: {', '.join(files)}, each as --set NAME=@FILE" if files else "; it takes no file"
    raise click.UsageError(f"{option}: {details['id']} has no argument {argument}{hint}")


def format_of(suffix: str, formats: list[str]) -> str:
    """Raises UsageError with the suffixes that the model's files may have."""
    name = suffix.removeprefix(".").lower()
    name = FORMATS.get(name, name)
    if name not in formats:
        raise click.UsageError(f"-o: a file must end in {', '.join(f'.{each}' for each in formats)}, got {suffix!r}")
    return name
