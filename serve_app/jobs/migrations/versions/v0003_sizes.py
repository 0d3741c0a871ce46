"""What decides how long the requests of a job take, for the books of admission."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sizes", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("jobs", "sizes")
