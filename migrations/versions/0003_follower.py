"""Leases of background work, and the changes whose webhooks are awaited."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "clerk_leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text()),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("completed_at", sa.BigInteger()),
        sa.Column("state", sa.Text()),
        sa.PrimaryKeyConstraint("name", name="pk_clerk_leases"),
    )
    op.create_table(
        "clerk_awaited_webhooks",
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.Column("is_deletion", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("object_id", "changed_at", name="pk_clerk_awaited_webhooks"),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("clerk_awaited_webhooks")
    op.drop_table("clerk_leases")
