"""Leases that are observed and not dated, webhooks whose deliveries are counted, and the model of each job."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("heartbeat", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("lease_s", sa.Double))
    op.drop_column("jobs", "lease_until")
    op.add_column("jobs", sa.Column("model", sa.String(255)))
    op.add_column("jobs", sa.Column("webhook_target", sa.String(300)))
    op.add_column("jobs", sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("webhook_taker", sa.String(128)))


def downgrade() -> None:
    for name in ("webhook_taker", "webhook_attempts", "webhook_target", "model", "lease_s", "heartbeat"):
        op.drop_column("jobs", name)
    op.add_column("jobs", sa.Column("lease_until", sa.Double))
