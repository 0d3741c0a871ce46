"""The panels of the dashboard, as a table: a row of it for each area, a panel for each question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Need = Literal["a GPU", "S3", "an outage of S3", "guidance_passes", ""]  # without it the panel has no data


@dataclass(frozen=True)
class Query:
    """In PromQL; APP stands for the selector of the chosen application, RANGE for the range of rates."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """`unit` is Grafana's name of it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    help: str = ""
    needs: Need = ""


@dataclass(frozen=True)
class Row:
    """Panels below a title."""

    title: str
    panels: tuple[Panel, ...]


MERGED = 'merged="true"'
APP, RANGE = 'application=~"$application"', "$__rate_interval"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """The sum of a counter's rate, for each value of the labels `by`."""
    selector = ",".join(filter(None, (APP, where)))
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{selector}}}[{RANGE}]))"


def now(metric: str, how: str = "sum", by: str = "", where: str = "") -> str:
    """A gauge."""
    selector = ",".join(filter(None, (APP, where)))
    return f"{how}{f' by ({by})' if by else ''} ({metric}{{{selector}}})"


def events(series: str, by: str = "") -> str:
    """What a histogram counted in the range.

    Ray's histograms cannot stand at 0: a series begins with its first events, in which `increase` sees none.
    """
    new = f"{series}{{{APP}}} unless {series}{{{APP}}} offset {RANGE}"
    return f"sum{f' by ({by})' if by else ''} (({new}) or increase({series}{{{APP}}}[{RANGE}]))"


def quantile(share: float, metric: str, by: str = "") -> str:
    """Of a histogram."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({share:g}, {events(f'{metric}_bucket', labels)})"


def mean(metric: str, by: str = "") -> str:
    """Of a histogram; from the middles of its buckets."""
    return f"{events(f'{metric}_sum', by)} / {events(f'{metric}_count', by)}"


def one(expression: str, legend: str) -> tuple[Query, ...]:
    return (Query(expression, legend),)


def quantiles(metric: str, by: str = "") -> tuple[Query, ...]:
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(Query(quantile(share, metric, by), f"{legend}p{share * 100:g}") for share in (0.5, 0.95))


ROWS = (
    Row("Requests", (
        Panel("Requests by outcome", "reqps", one(rate("ray_triptych_requests_total", "outcome"), "{{outcome}}")),
        Panel("Requests by route", "reqps", one(rate("ray_triptych_requests_total", "route"), "{{route}}")),
        Panel("Requests by model", "reqps",
              one(rate("ray_triptych_model_requests_total", "model, outcome"), "{{model}} {{outcome}}")),
        Panel("Seconds of an answer", "s", quantiles("ray_triptych_request_seconds", "route")),
        Panel("Being answered", "short", one(now("ray_triptych_requests_open"), "open")),
        Panel("Refused: no room", "reqps", one(rate("ray_triptych_requests_refused_total", "reason"), "{{reason}}")),
        Panel("Let in and not done", "short",
              one(now("ray_triptych_pending", "max", "model, who"), "{{model}} {{who}}")),
        Panel("Queue, and its bound", "s", (
            Query(now("ray_triptych_queue_seconds", "max", "model, queue"), "{{model}} {{queue}}"),
            Query(now("ray_triptych_queue_limit_seconds", "max", "model, queue"), "bound of {{model}} {{queue}}"))),
        Panel("Made", "ops", one(rate("ray_triptych_made_total", "model, kind"), "{{model}} {{kind}}")),
        Panel("Shared with an equal request", "ops", one(rate("ray_triptych_shared_total"), "shared")),
        Panel("Asleep", "short", one(now("ray_triptych_model_asleep", "max", "model"), "{{model}}")),
        Panel("Woken", "ops", one(rate("ray_triptych_model_wakes_total", "model"), "{{model}}")),
        Panel("Seconds of the last load", "s",
              one(now("ray_triptych_model_load_seconds", "max", "model"), "{{model}}")),
    )),
    Row("Stages", (
        Panel("Healthy replicas", "short", one(now("ray_triptych_stage_replicas", "sum", "stage"), "{{stage}}")),
        Panel("Requests in the stages", "short",
              one(now("ray_triptych_stage_present", "sum", "stage, state"), "{{stage}} {{state}}")),
        Panel("Seconds of waiting", "s", quantiles("ray_triptych_stage_queue_seconds", "stage")),
        Panel("Seconds of work", "s", quantiles("ray_triptych_stage_seconds", "stage")),
        Panel("Busy share of a replica", "percentunit", one(
            f"{rate('ray_triptych_stage_busy_seconds_total', 'stage')} / "
            f"{now('ray_triptych_stage_replicas', 'sum', 'stage')}", "{{stage}}")),
        Panel("Requests by outcome", "reqps",
              one(rate("ray_triptych_stage_requests_total", "stage, outcome"), "{{stage}} {{outcome}}")),
        Panel("Bytes between stages", "Bps",
              one(rate("ray_triptych_stage_bytes_total", "stage, direction"), "{{stage}} {{direction}}")),
        Panel("Files of media", "Bps", one(rate("ray_triptych_media_bytes_total", "format"), "{{format}}")),
        Panel("Seconds to write a file", "s", quantiles("ray_triptych_media_seconds", "format")),
        Panel("Processes that write files", "short",
              one(now("ray_triptych_media_workers", "sum", "state"), "{{state}}")),
    )),
    Row("Engine", (
        Panel("Steps per second", "ops", one(rate("ray_triptych_steps_total"), "steps")),
        Panel("Busy share", "percentunit", one(now("ray_triptych_engine_busy_share", "avg", "replica"), "{{replica}}")),
        Panel("Forwards of a turn", "short", (
            Query(mean("ray_triptych_batch_size", "component"), "{{component}} mean"),
            *quantiles("ray_triptych_batch_size", "component"))),
        Panel("Share of forwards in a batch", "percentunit", one(
            f"({rate('ray_triptych_forwards_total', where=MERGED)} or 0 * {rate('ray_triptych_forwards_total')}) / "
            f"{rate('ray_triptych_forwards_total')}", "merged")),
        Panel("Passes of one request in a batch", "ops", (
            Query(rate("ray_triptych_passes_together_total", "component"), "{{component}} together"),
            Query(rate("ray_triptych_merges_refused_total", "component"), "{{component}} structures refused")),
            needs="guidance_passes"),
        Panel("Seconds of a turn", "s", quantiles("ray_triptych_step_seconds", "size")),
        Panel("Seconds that a forward waits", "s", quantiles("ray_triptych_step_queue_seconds", "component")),
        Panel("Seconds of the device per second", "percentunit",
              one(rate("ray_triptych_device_seconds_total", "component"), "{{component}}")),
        Panel("Steps under Cache-DiT", "ops", one(rate("ray_triptych_cached_steps_total", "kind"), "{{kind}}")),
    )),
    Row("Jobs", (
        Panel("Jobs by status", "short", one(now("ray_triptych_jobs", "max", "status"), "{{status}}")),
        Panel("Taken and ended", "ops", (
            Query(rate("ray_triptych_jobs_taken_total", "model"), "{{model}} taken"),
            Query(rate("ray_triptych_jobs_ended_total", "model, outcome"), "{{model}} {{outcome}}"))),
        Panel("Seconds of a job", "s", quantiles("ray_triptych_job_seconds", "outcome")),
        Panel("Seconds until a job begins", "s", quantiles("ray_triptych_job_wait_seconds")),
        Panel("Job store answers", "short", one(now("ray_triptych_job_store_up", "min"), "up")),
        Panel("Webhooks", "ops", one(rate("ray_triptych_webhooks_total", "outcome"), "{{outcome}}")),
        Panel("Seconds of a webhook", "s", quantiles("ray_triptych_webhook_seconds", "outcome")),
    )),
    Row("Storage", (
        Panel("Calls", "ops", one(rate("ray_triptych_storage_seconds_count", "operation, outcome"),
                                  "{{operation}} {{outcome}}")),
        Panel("Seconds of a call", "s", quantiles("ray_triptych_storage_seconds", "operation")),
        Panel("Stored", "Bps", one(rate("ray_triptych_stored_bytes_total", "way"), "{{way}}")),
        Panel("Circuit open", "short", one(now("ray_triptych_storage_circuit_open", "max"), "open")),
        Panel("Entries of the spool", "short", one(now("ray_triptych_spool_entries", "max", "entry"), "{{entry}}"),
              needs="S3"),
        Panel("Bytes of the spool", "bytes", one(now("ray_triptych_spool_bytes", "max"), "bytes"), needs="S3"),
        Panel("Age of the spool", "s", one(now("ray_triptych_spool_oldest_seconds", "max"), "oldest"), needs="S3"),
        Panel("Into the spool", "ops", one(rate("ray_triptych_spooled_total"), "spooled")),
    )),
    Row("Recovery", (
        Panel("Recoveries and resumes", "ops", (
            Query(rate("ray_triptych_recoveries_total"), "recoveries"),
            Query(rate("ray_triptych_resumes_total"), "resumes from a checkpoint"),
            Query(rate("ray_triptych_given_up_total"), "given up"))),
        Panel("Steps done again", "ops", one(rate("ray_triptych_lost_steps_total"), "steps")),
        Panel("Ways through the stages", "ops", (
            Query(rate("ray_triptych_attempts_total"), "begun"),
            Query(rate("ray_triptych_begun_again_total", "start"), "again: {{start}}"),
            Query(rate("ray_triptych_replica_refusals_total"), "refused by a replica"),
            Query(rate("ray_triptych_memory_waits_total"), "waits for memory"))),
        Panel("Checkpoints", "ops", one(rate("ray_triptych_checkpoint_seconds_count"), "made")),
        Panel("Bytes of checkpoints", "Bps", one(rate("ray_triptych_checkpoints_made_bytes_total"), "bytes")),
        Panel("Bytes of a checkpoint", "bytes", quantiles("ray_triptych_checkpoint_bytes")),
        Panel("Seconds to make a checkpoint", "s", quantiles("ray_triptych_checkpoint_seconds")),
        Panel("Cancelled, taken over, dead file writers", "ops", (
            Query(rate("ray_triptych_cancels_total"), "cancelled requests"),
            Query(rate("ray_triptych_job_takeovers_total"), "jobs taken over"),
            Query(rate("ray_triptych_media_worker_deaths_total"), "dead file writers"))),
    )),
    Row("LoRAs", (
        Panel("In memory", "short", one(now("ray_triptych_adapters", "sum", "stage, tier"), "{{stage}} {{tier}}")),
        Panel("Bytes in memory", "bytes",
              one(now("ray_triptych_adapter_bytes", "sum", "stage, tier"), "{{stage}} {{tier}}")),
        Panel("Looks for one", "ops",
              one(rate("ray_triptych_adapter_lookups_total", "tier, event"), "{{tier}} {{event}}")),
        Panel("Seconds to load one", "s", quantiles("ray_triptych_adapter_load_seconds", "tier")),
    )),
    Row("Devices", (
        Panel("Memory", "bytes",
              one(now("ray_triptych_device_memory_bytes", "max", "replica, kind"), "{{replica}} {{kind}}"),
              "As torch's allocator counts it.", needs="a GPU"),
        Panel("Out of memory", "ops", one(rate("ray_triptych_out_of_memory_total", "stage"), "{{stage}}")),
    )),
    Row("API keys", (
        Panel("Requests", "reqps", one(rate("ray_triptych_key_requests_total", "key, outcome"), "{{key}} {{outcome}}")),
        Panel("Seconds of devices per second", "percentunit",
              one(rate("ray_triptych_key_compute_seconds_total", "key"), "{{key}}"),
              "A key is told by `printf %s LABEL | sha256sum | cut -c1-12`."),
        Panel("Made", "ops", one(rate("ray_triptych_key_made_total", "key"), "{{key}}")),
    )),
    Row("What is served", (
        Panel("Models", "short", one(now("ray_triptych_model_info", "max", "application, model"),
                                     "{{application}}: {{model}}")),
        Panel("Deployments that requests go through", "short",
              one(now("ray_triptych_stages_wanted", "max", "application, target"), "{{application}} {{target}}")),
    )),
)  # fmt: skip
