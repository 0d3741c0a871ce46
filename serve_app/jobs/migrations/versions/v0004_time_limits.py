"""By when a job must have begun and be done, where its caller says so."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("start_by", sa.Double))
    op.add_column("jobs", sa.Column("cancel_at", sa.Double))


def downgrade() -> None:
    op.drop_column("jobs", "cancel_at")
    op.drop_column("jobs", "start_by")
