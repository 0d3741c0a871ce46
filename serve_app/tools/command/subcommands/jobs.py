"""`triptych jobs`: what was asked of a server, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from serve_app.tools.command.exits import CommandError, Interrupted
from serve_app.tools.command.server.options import asks_a_server, opened
from serve_app.tools.command.shown.progress import shown_progress
from serve_app.tools.command.shown.text import printable

MOST = 100  # of a page
STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")  # as serve_app/jobs/records.py has them


@click.group()
def jobs() -> None:
    """The jobs of a server: list, show, watch, cancel, download."""


@jobs.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="How many.")
@click.option(
    "--status",
    type=click.Choice(STATUSES),
    multiple=True,
    help="Those of this status alone; again: of any of them.",
)
@asks_a_server
def list_jobs(limit: int, status: tuple[str, ...], url: str, api_key_file: Path | None, as_json: bool) -> None:
    """The last jobs of this API key, the newest first."""
    with opened(url, api_key_file) as server:
        found: list[dict[str, Any]] = []
        more: dict[str, Any] = {}
        while len(found) < limit:
            page = server.get("v1/jobs", limit=min(MOST, limit - len(found)), status=status, **more)
            found += page["data"]
            if not page["has_more"]:
                break
            more = {"after": page["last_id"]}
    if as_json:
        click.echo(json.dumps({"jobs": found}, indent=2))
        return
    from serve_app.tools.command.shown.tables import ago, console, table

    rows = [
        [
            job["id"],
            job["kind"],
            job["model"],
            state_of(job),
            ago(job["created_at"]),
            (job["error"] or {}).get("message"),
        ]
        for job in found
    ]
    console().print(table(["id", "kind", "model", "state", "asked", "error"], rows) if rows else "no jobs")


@jobs.command()
@click.argument("job_id", metavar="ID")
@asks_a_server
def show(job_id: str, url: str, api_key_file: Path | None, as_json: bool) -> None:
    """A job as it stands."""
    from serve_app.tools.command.server.following import path_of

    with opened(url, api_key_file) as server:
        job = server.get(path_of(job_id))
    if as_json:
        click.echo(json.dumps(job, indent=2))
        return
    from serve_app.tools.command.shown.tables import at, console, table

    times = {"asked": "created_at", "started": "started_at", "ended": "completed_at", "kept until": "expires_at"}
    rows = [["kind", job["kind"]], ["model", job["model"]], ["state", state_of(job)]]
    rows += [[name, at(job[field])] for name, field in times.items() if job[field]]
    rows += [["error", f"{job['error']['message']} ({job['error']['code']})"]] if job["error"] else []
    rows += [["warning", each["message"]] for each in job["warnings"]]
    if job["result"]:
        rows += [["file", f"seed {each['seed']}, {each['url']}"] for each in job["result"]["data"]]
    console().print(table([job["id"], ""], rows))


@jobs.command()
@click.argument("job_id", metavar="ID")
@asks_a_server
def watch(job_id: str, url: str, api_key_file: Path | None, as_json: bool) -> None:
    """Follow a job to its end. Ctrl-C ends the watching, not the job."""
    from serve_app.tools.command.server.following import check_end, follow, path_of

    with opened(url, api_key_file) as server:
        try:
            with shown_progress(job_id) as progress:
                check_end(job_id, follow(server, job_id, progress))
        except KeyboardInterrupt:
            raise Interrupted(f"the job {job_id} goes on; `triptych jobs cancel {job_id}` ends it") from None
        job = server.get(path_of(job_id))
    click.echo(json.dumps(job, indent=2) if as_json else printable(f"{job_id}: {job['status']}"))


@jobs.command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@asks_a_server
def cancel(job_ids: tuple[str, ...], url: str, api_key_file: Path | None, as_json: bool) -> None:
    """End jobs that wait or run."""
    from serve_app.tools.command.server.client import of_each
    from serve_app.tools.command.server.following import path_of

    with opened(url, api_key_file) as server:
        cancelled = of_each(job_ids, lambda job_id: server.post(path_of(job_id, "cancel")))
    if as_json:
        click.echo(json.dumps({"jobs": cancelled}, indent=2))
    else:
        click.echo(printable("\n".join(f"{job['id']}: {job['status']}" for job in cancelled)))


@jobs.command()
@click.argument("job_id", metavar="ID")
@click.option(
    "-o", "--output", metavar="FILE", help="Of several FILE-1, FILE-2 ...; -: stdout. Default: by kind and seed."
)
@asks_a_server
def download(job_id: str, output: str | None, url: str, api_key_file: Path | None, as_json: bool) -> None:
    """The files of a completed job."""
    from serve_app.tools.command.server.following import path_of
    from serve_app.tools.command.subcommands.generating import document, files_of, written

    if output == "-" and as_json:
        raise click.UsageError("-o - and --json would both write to stdout: choose one")
    with opened(url, api_key_file) as server:
        job = server.get(path_of(job_id))
        if job["status"] != "completed":
            raise CommandError(f"the job {job_id} has no files: it is {job['status']}; `triptych jobs watch {job_id}`")
        files = files_of(server, job)
    paths = written(files, job, output)
    if as_json:
        click.echo(json.dumps(document(job, files, paths), indent=2))
    else:
        tell_paths(paths)


def tell_paths(paths: Sequence[str]) -> None:
    click.echo("\n".join(paths), err=True)


def state_of(job: dict[str, Any]) -> str:
    if job["status"] == "in_progress":
        return f"{job['progress']} %"
    if job["status"] == "queued" and job["queue_position"] is not None:
        return f"queued, {job['queue_position']} before it"
    return str(job["status"])
