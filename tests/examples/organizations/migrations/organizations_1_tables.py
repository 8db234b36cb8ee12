"""The tables of organizations and memberships."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "organizations_1"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = {"organizations": ("name", "slug"), "organization_memberships": ("organization_id", "user_id", "role")}


def upgrade() -> None:
    """Create both tables."""
    bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    for table, columns in TABLES.items():
        op.create_table(
            table,
            sa.Column("id", sa.Text(), nullable=False),
            *(sa.Column(name, sa.Text()) for name in columns),
            sa.Column("deleted_at", sa.DateTime(timezone=True)),
            sa.Column("version_updated_at", sa.BigInteger()),
            sa.Column("version_timestamp", sa.BigInteger()),
            sa.Column("version_message_id", bytewise),
            sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        )
    for column in ("organization_id", "user_id"):
        op.create_index(f"ix_organization_memberships_{column}", "organization_memberships", [column])


def downgrade() -> None:
    """Drop both tables."""
    for table in reversed(TABLES):
        op.drop_table(table)
