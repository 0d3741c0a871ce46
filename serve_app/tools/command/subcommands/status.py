"""`triptych status`: what a server does, once or second by second."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.tools.command.exits import CommandError, Exit
from serve_app.tools.command.server.options import asks_a_server, opened
from serve_app.tools.command.shown.text import printable

if TYPE_CHECKING:
    from serve_app.tools.command.server.client import Server

CLUSTER = "ui/cluster"
PAUSE_S = 2.0  # where the server tells nothing of itself as it happens
AGAIN_S = 0.1  # after a stream that the server has ended
NO_CLUSTER = "replicas and batches are not told: the server has `playground: false`"


@click.command()
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C; with --json a document a line.")
@asks_a_server
def status(watch: bool, url: str, api_key_file: Path | None, as_json: bool) -> int:
    """What a server does: its model, stages, replicas, queue and batches.

    The exit code is 0 where all stages can serve, else 1.
    """
    with opened(url, api_key_file) as server:
        if watch:
            return watched(server, as_json)
        seen = looked(server, next(cluster_of(server)))
    if as_json:
        click.echo(json.dumps(seen, indent=2))
    else:
        from serve_app.tools.command.shown.tables import console

        console().print(shown(seen))
    return Exit.OK if seen["ready"] else Exit.FAILED


def watched(server: Server, as_json: bool) -> int:
    """Until Ctrl-C, which is how one ends it."""
    try:
        if as_json:
            for cluster in cluster_of(server):
                click.echo(json.dumps(looked(server, cluster)))
        from rich.live import Live

        from serve_app.tools.command.shown.tables import console

        if not sys.stdout.isatty():  # where Live would write once, at its end
            for cluster in cluster_of(server):
                console().print(shown(looked(server, cluster)))
        with Live(console=console(), auto_refresh=False) as live:
            for cluster in cluster_of(server):
                live.update(shown(looked(server, cluster)), refresh=True)
    except KeyboardInterrupt:
        pass
    return Exit.OK


# --- what the server tells -------------------------------------------------------------------------------------------


def looked(server: Server, cluster: dict[str, Any] | None) -> dict[str, Any]:
    """The document of `--json`: `cluster` is what GET /ui/cluster tells."""
    code, health = server.any_status("health")
    if "stages" not in health:
        raise CommandError(
            f"{server.name} is no Triptych server, or it is starting: /health answers {code}", Exit.SERVERS_FAULT
        )
    models = server.get("v1/models")["data"]
    return {
        "url": server.name,
        "ready": code == 200,
        "models": [each["id"] for each in models if each["parent"] is None],
        "health": health,
        "cluster": cluster,
    }


def cluster_of(server: Server) -> Iterator[dict[str, Any] | None]:
    """Second by second, without an end; None where the server does not tell. It closes each stream after some time."""
    import httpx2

    while True:
        try:
            for event in server.events(CLUSTER):
                yield event.data
            time.sleep(AGAIN_S)
        except CommandError as error:
            if error.details.get("status") != 404:
                raise
            yield None
            time.sleep(PAUSE_S)
        except httpx2.RequestError as error:
            from serve_app.tools.command.server.client import unreachable

            raise unreachable(server.name, error) from error


# --- for people ------------------------------------------------------------------------------------------------------


def shown(seen: dict[str, Any]) -> Any:
    """A group of tables of rich."""
    from rich.console import Group
    from rich.text import Text

    state = "ready" if seen["ready"] else "not ready"
    head = Text(printable(f"{seen['url']}: {', '.join(seen['models'])}, {state}"))
    if seen["cluster"] is None:
        return Group(head, table_of_health(seen["health"]), Text(NO_CLUSTER))
    return Group(head, Text(waiting_in_words(seen["cluster"]["waiting"])), table_of_cluster(seen))


def table_of_health(health: dict[str, Any]) -> Any:
    from serve_app.tools.command.shown.tables import table

    rows = [
        [name, "ready" if stage["ready"] else stage["detail"] or "loading"] for name, stage in health["stages"].items()
    ]
    return table(["stage", "state"], rows)


def waiting_in_words(waiting: dict[str, Any]) -> str:
    jobs = waiting["jobs"]
    told = "the job store does not answer" if jobs is None else jobs_in_words(jobs)
    return f"let in: {waiting['let_in']}, queue: {waiting['queue_s']:g} s; {told}"


def jobs_in_words(jobs: dict[str, int]) -> str:
    return "jobs: " + (", ".join(f"{count} {state.replace('_', ' ')}" for state, count in jobs.items()) or "none")


def table_of_cluster(seen: dict[str, Any]) -> Any:
    from serve_app.tools.command.shown.tables import table

    stages = seen["health"]["stages"]
    rows = [row for each in seen["cluster"]["deployments"] for row in rows_of(each, stages.get(each["name"]))]
    heads = ["deployment", "replica", "stage", "busy", "requests", "seconds each", "batches", "steps"]
    return table(heads, rows)


def rows_of(deployment: dict[str, Any], stage: dict[str, Any] | None) -> Iterator[list[Any]]:
    """A row for each stage of each replica; one that tells what the matter is where none answers."""
    name = deployment["name"]
    if deployment["trouble"]:
        detail = (stage or {}).get("detail")
        yield [name, None, detail or deployment["trouble"], None, None, None, None, None]
    for replica in deployment["replicas"]:
        for each in replica["stages"]:
            busy = None if each["busy"] is None else f"{100 * each['busy']:.0f} %"
            batches = batches_in_words(replica["batches"]) if each["stage"] == "denoiser" else None
            steps = ", ".join(f"{r['steps']}/{r['num_steps']}" for r in each["requests"] if r["num_steps"])
            yield [name, replica["id"], each["stage"], busy, each["present"], f"{each['request_s']:g}", batches, steps]


def batches_in_words(batches: list[dict[str, int]] | None) -> str | None:
    return None if batches is None else ", ".join(f"{each['count']} of {each['size']}" for each in batches)
