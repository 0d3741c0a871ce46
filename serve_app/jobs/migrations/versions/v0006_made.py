"""What was made: warnings of jobs, steps of outputs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("warnings", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("job_outputs", sa.Column("num_steps", sa.Integer))


def downgrade() -> None:
    op.drop_column("job_outputs", "num_steps")
    op.drop_column("jobs", "warnings")
