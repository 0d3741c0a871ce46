"""The tables of the job store, as SQLAlchemy knows them; `migrations` makes them in a database."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
Seconds = sa.Double  # Unix time
Json = sa.JSON

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(96), primary_key=True),
    sa.Column("application", sa.String(255), nullable=False),  # whose replicas may run it
    sa.Column("model", sa.String(255)),  # whose replicas make it; empty in rows of earlier versions
    sa.Column("kind", sa.String(16), nullable=False),  # image, video, audio, tensors
    sa.Column("owner", sa.String(128), nullable=False),  # who may see it; "" where nobody has to say who they are
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),  # 0..100, never less than before
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("started_at", Seconds),
    sa.Column("completed_at", Seconds),
    sa.Column("expires_at", Seconds),  # set when it ends
    sa.Column("requests", Json, nullable=False),
    sa.Column("shown", Json, nullable=False),  # what the caller asked for, as answers repeat it
    sa.Column("timings", Json, nullable=False),  # seconds of each part, by request
    sa.Column("error", Json),
    sa.Column("lease_owner", sa.String(128)),  # the runner that works on it
    sa.Column("heartbeat", sa.BigInteger, nullable=False, server_default="0"),  # changes while the runner lives
    sa.Column("lease_s", sa.Double),  # seconds without a change after which the runner is taken for dead
    sa.Column("takeovers", sa.Integer, nullable=False),  # runners that died with it since it last got further
    sa.Column("sizes", Json, nullable=False, server_default="[]"),  # width, height, frames, steps of each request
    sa.Column("start_by", Seconds),  # when it is cancelled if it has not begun; empty once it has
    sa.Column("cancel_at", Seconds),  # when it is cancelled if it has not ended
    sa.Column("is_awaited", sa.Boolean, nullable=False, server_default=sa.false()),  # a caller waits: it goes first
    sa.Column("warnings", Json, nullable=False, server_default="[]"),  # what its caller should know
    sa.Column("webhook_url", sa.String(2000)),
    sa.Column("webhook_target", sa.String(300)),  # host and port of the URL
    sa.Column("webhook_due", Seconds),  # when its end is to be told; empty when it is not, or was
    sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),  # deliveries that were begun
    sa.Column("webhook_taker", sa.String(128)),  # the process that delivers it now
    sa.Index("ix_jobs_waiting", "application", "status", "created_at"),
    sa.Index("ix_jobs_listed", "application", "owner", "kind", "created_at", "id"),
    sa.Index("ix_jobs_expired", "expires_at"),
    sa.Index("ix_jobs_webhook_due", "webhook_due"),
)


def _job_id() -> sa.Column[str]:
    return sa.Column("job_id", sa.String(96), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


input_images = sa.Table(
    "job_input_images",
    metadata,
    _job_id(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

checkpoints = sa.Table(
    "job_checkpoints",
    metadata,
    _job_id(),
    sa.Column("request", sa.Integer, primary_key=True),  # its place in `requests`
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

outputs = sa.Table(
    "job_outputs",
    metadata,
    _job_id(),
    sa.Column("request", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),  # of the request's files
    sa.Column("key", sa.String(256), nullable=False, index=True),
    sa.Column("content_type", sa.String(64), nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("num_frames", sa.Integer, nullable=False),
    sa.Column("fps", sa.Double),
    sa.Column("upload_pending", sa.Boolean, nullable=False),
    sa.Column("num_steps", sa.Integer),  # scheduler steps that were made
    sa.Column("sample_rate", sa.Integer),  # of its sound
    sa.Column("channels", sa.Integer),
    sa.Column("num_samples", sa.BigInteger),  # of each channel
)

events = sa.Table(
    "job_events",
    metadata,
    _job_id(),
    sa.Column("number", sa.Integer, primary_key=True),  # 1, 2, ... within the job
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", Json, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
)

idempotency_keys = sa.Table(
    "job_idempotency_keys",
    metadata,
    sa.Column("application", sa.String(255), primary_key=True),
    sa.Column("owner", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(96), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
)

# LoRAs that were added while running: see serve_app.adapters.
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("application", sa.String(255), primary_key=True),
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("weight_name", sa.String(255)),
    sa.Column("component", sa.String(255)),
    sa.Column("scale", Json, nullable=False),  # of requests that give none
    sa.Column("facts", Json, nullable=False),  # what a stage has read in the file
    sa.Column("created_at", Seconds, nullable=False),
)
