"""`triptych models`: what a server serves, and what a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from serve_app.tools.command.server.options import asks_a_server, opened


@click.command()
@click.argument("model", required=False)
@asks_a_server
def models(model: str | None, url: str, api_key_file: Path | None, as_json: bool) -> None:
    """What a server serves; of a MODEL what it makes and which arguments it takes."""
    with opened(url, api_key_file) as server:
        if model is None:
            found = {"models": server.get("v1/models")["data"]}
        else:
            found = server.get(f"v1/models/{quote(model, safe='/:')}")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from serve_app.tools.command.shown.tables import ago, console, table

    if model is None:
        columns = ("id", "kind", "state", "alias_of", "parent")
        rows = [[*(each[name] for name in columns), ago(each["created"])] for each in found["models"]]
        console().print(table(["model", "makes", "state", "an alias of", "a LoRA of", "served since"], rows))
        return
    console().print(table([found["id"], ""], about(found)))
    if found["arguments"] is None:
        console().print("it is not ready to tell what it takes: try again, `triptych status` tells how far it is")
        return
    heads = ["argument", "type", "default", "matters", ""]
    console().print(table(heads, [row_of(each) for each in found["arguments"]]))


def about(details: dict[str, Any]) -> list[list[Any]]:
    asked = details["asked"]
    if asked is None:
        return []
    rows = [
        ["makes", asked["makes"]],
        ["tasks", ", ".join(asked["tasks"])],
        ["files", ", ".join(asked["output_formats"])],
    ]
    if asked["size"]:
        size = asked["size"]
        sides = (size["default_width"], size["default_height"])
        own = "x".join(str(side or "its own") for side in sides) if any(sides) else "the pipeline's"
        most = f"sides up to {size['max_side']}, {size['max_pixels']} pixels, multiples of {size['multiple_of']}"
        rows.append(["size", f"default {own}; {most}"])
    if details["quality"]:
        rows += [[f"quality {level}", json.dumps(details["levels"][level])] for level in details["quality"]]
    return rows


def row_of(argument: dict[str, Any]) -> list[Any]:
    """`field` is what a request calls it."""
    default = "needed" if argument["required"] else json.dumps(argument["default"])
    return [
        argument["field"],
        argument["media"] or argument["type"],
        default,
        argument["when"],
        argument["description"][:80],
    ]
