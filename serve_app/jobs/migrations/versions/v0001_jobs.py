"""The first tables: jobs, what they need, what they made, what happened."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Json = sa.JSON


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(96), primary_key=True),
        sa.Column("application", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("expires_at", sa.Double),
        sa.Column("requests", Json, nullable=False),
        sa.Column("shown", Json, nullable=False),
        sa.Column("timings", Json, nullable=False),
        sa.Column("error", Json),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.Double),
        sa.Column("takeovers", sa.Integer, nullable=False),
    )
    op.create_index("ix_jobs_waiting", "jobs", ["application", "status", "created_at"])
    op.create_index("ix_jobs_listed", "jobs", ["application", "owner", "kind", "created_at", "id"])
    op.create_index("ix_jobs_expired", "jobs", ["expires_at"])
    op.create_table(
        "job_input_images",
        _job_id(),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "job_checkpoints",
        _job_id(),
        sa.Column("request", sa.Integer, primary_key=True),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "job_outputs",
        _job_id(),
        sa.Column("request", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(256), nullable=False),
        sa.Column("content_type", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("num_frames", sa.Integer, nullable=False),
        sa.Column("fps", sa.Double),
        sa.Column("upload_pending", sa.Boolean, nullable=False),
    )
    op.create_index("ix_job_outputs_key", "job_outputs", ["key"])
    op.create_table(
        "job_events",
        _job_id(),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", Json, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "job_idempotency_keys",
        sa.Column("application", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(96), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    )
    op.create_index("ix_job_idempotency_keys_job_id", "job_idempotency_keys", ["job_id"])


def downgrade() -> None:
    for name in ("idempotency_keys", "events", "outputs", "checkpoints", "input_images"):
        op.drop_table(f"job_{name}")
    op.drop_table("jobs")


def _job_id() -> sa.Column[str]:
    return sa.Column("job_id", sa.String(96), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
