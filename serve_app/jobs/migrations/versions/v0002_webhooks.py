"""Where the end of a job is told, and when that is due."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("webhook_url", sa.String(2000)))
    op.add_column("jobs", sa.Column("webhook_due", sa.Double))
    op.create_index("ix_jobs_webhook_due", "jobs", ["webhook_due"])


def downgrade() -> None:
    op.drop_index("ix_jobs_webhook_due", "jobs")
    op.drop_column("jobs", "webhook_due")
    op.drop_column("jobs", "webhook_url")
