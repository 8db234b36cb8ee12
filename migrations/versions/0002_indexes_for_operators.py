"""What is asked about users as a whole: the newest, and those that nothing has filled in yet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UNFILLED = sa.text("version_updated_at IS NULL AND deleted_at IS NULL")


def upgrade() -> None:
    """Create the indexes."""
    op.create_index("ix_users_created_at_id", "users", ["created_at", "id"])
    op.create_index("ix_users_unfilled", "users", ["created_at"], postgresql_where=UNFILLED, sqlite_where=UNFILLED)


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_users_unfilled", "users")
    op.drop_index("ix_users_created_at_id", "users")
