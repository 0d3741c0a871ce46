"""The sound of outputs: its rate, channels and length."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_outputs", sa.Column("sample_rate", sa.Integer))
    op.add_column("job_outputs", sa.Column("channels", sa.Integer))
    op.add_column("job_outputs", sa.Column("num_samples", sa.BigInteger))


def downgrade() -> None:
    for name in ("num_samples", "channels", "sample_rate"):
        op.drop_column("job_outputs", name)
