"""`triptych loras`: the LoRAs that requests of a server may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from serve_app.tools.command.server.options import asks_a_server, opened
from serve_app.tools.command.shown.text import printable


@click.group()
def loras() -> None:
    """The LoRAs of a server: list, add, remove."""


@loras.command("list")
@asks_a_server
def list_loras(url: str, api_key_file: Path | None, as_json: bool) -> None:
    """Those of its configuration and those that were added."""
    with opened(url, api_key_file) as server:
        found = server.get("v1/loras")["data"]
    if as_json:
        click.echo(json.dumps({"loras": found}, indent=2))
        return
    from serve_app.tools.command.shown.tables import console, table

    rows = [
        [each["name"], each["source"], each["scale"], each["rank"], size_of(each), held_by(each), each["parent"]]
        for each in found
    ]
    heads = ["name", "from", "scale", "rank", "size", "in memory of", "model"]
    console().print(table(heads, rows) if rows else "no LoRAs")


@loras.command()
@click.argument("name")
@click.argument("path")
@click.option("--model", metavar="NAME", help="That it changes; needed where the server has several.")
@click.option("--weight-name", metavar="FILE", help="The file, where PATH is a place with several.")
@click.option("--component", metavar="NAME", help="Into which it goes, where the pipeline has several of a kind.")
@click.option("--scale", type=float, metavar="X", help="Of requests that give none; default: 1.")
@asks_a_server
def add(
    name: str,
    path: str,
    model: str | None,
    weight_name: str | None,
    component: str | None,
    scale: float | None,
    url: str,
    api_key_file: Path | None,
    as_json: bool,
) -> None:
    """Let the server load one from a place that it allows (`adapter_places`).

    PATH is read by the server: a file or folder there, s3://bucket/key, or OWNER/REPOSITORY of the hub.
    """
    given = {"model": model, "weight_name": weight_name, "component": component, "scale": scale}
    body = {"name": name, "path": path} | {key: value for key, value in given.items() if value is not None}
    with opened(url, api_key_file) as server:
        added = server.post("v1/loras", body)
    told = f"{added['name']}: added, requests name it {added['id']}"
    click.echo(json.dumps(added, indent=2) if as_json else printable(told))


@loras.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@asks_a_server
def remove(names: tuple[str, ...], url: str, api_key_file: Path | None, as_json: bool) -> None:
    """Forget LoRAs, each called NAME or MODEL:NAME; requests under way go on."""
    from serve_app.tools.command.server.client import of_each

    with opened(url, api_key_file) as server:
        removed = of_each(names, lambda name: server.delete(f"v1/loras/{quote(name, safe='')}"))
    click.echo(json.dumps({"loras": removed}, indent=2) if as_json else "\n".join(f"{name}: removed" for name in names))


def size_of(lora: dict[str, Any]) -> str | None:
    return None if lora["bytes"] is None else f"{lora['bytes'] / 1e6:.1f} MB"


def held_by(lora: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in lora["held_by"].items() if count)
