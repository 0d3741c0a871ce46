"""The page docs/metrics.md, made from the table."""

# ruff: noqa: E501  (lines of a page)

from __future__ import annotations

from deployments.metrics.metric import NAMESPACE, OF_SERVE, Area, Label, Metric
from deployments.metrics.table import AREAS

HEAD = f"""# Metrics

Made from `deployments/metrics/table.py` by `python -m deployments.metrics.write`; a test keeps it fresh.

Prometheus reads every name with `{NAMESPACE}` before it, from Ray's own endpoint on each node ([operations](operations.md#watch-it)).
Every metric has the labels {", ".join(f"`{label}`" for label in OF_SERVE)} of Serve too, and those of Ray (`SessionName`,
`WorkerId` and others). `ray_serve_*` are Serve's own.

* A label has the values that stand here, or the first so many that a process meets: what comes after them is `other`. Nothing that
  a caller sends can make more series.
* Counters with known labels stand at 0 from the start of a process, so that their first event is an increase. A counter ends
  with its process: ask for `rate()` or `increase()`, summed over `replica`. Gauges of a process that has ended go after 20 s.
* Ray passes metrics on every 10 s, and of histograms only the counts of buckets: `_count` and quantiles are right, `_sum` is reckoned
  from the middles of the buckets. What must add up is a counter.
* `triptych_jobs`, `triptych_pending` of jobs, and `triptych_spool_*` are told by every ingress replica of the application, or of the
  machine: take `max`, not `sum`.
* An API key is told by `printf %s LABEL | sha256sum | cut -c1-12`, never by its label.
* The ingress has no `/metrics` of its own: a request through Serve's proxy reaches any one of its replicas, and none of the stages.
"""


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([HEAD, *(_of_area(area) for area in AREAS.values())])


def _of_area(area: Area) -> str:
    rows = "\n".join(_row(metric) for metric in area.metrics)
    return (
        f"## {area.title}\n\nTold by: {area.told_by}.\n\n"
        f"| name | kind | labels | unit | meaning |\n|---|---|---|---|---|\n{rows}\n"
    )


def _row(metric: Metric) -> str:
    labels = "<br>".join(f"`{name}`: {_meaning(label)}" for name, label in metric.labels.items())
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.help} |"


def _meaning(label: Label) -> str:
    if label.is_open:
        return f"{label.help} (at most {label.at_most})"
    return f"{label.help} ({', '.join(label.values)})"
