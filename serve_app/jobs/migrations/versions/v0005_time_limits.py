"""By when a job must have begun and be done, where its caller says so; whether a caller waits for its end."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("start_by", sa.Double))
    op.add_column("jobs", sa.Column("cancel_at", sa.Double))
    op.add_column("jobs", sa.Column("is_awaited", sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("jobs", "is_awaited")
    op.drop_column("jobs", "cancel_at")
    op.drop_column("jobs", "start_by")
