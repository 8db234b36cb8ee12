"""What the console counts and searches: tombstones, and users by the beginning of a name or of a last name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

DELETED = sa.text("deleted_at IS NOT NULL")
NAMES = {
    "ix_users_name": '(lower(name) COLLATE "C")',
    "ix_users_last_name": "(lower(substr(name, strpos(name, ' ') + 1)) COLLATE \"C\")",
}


def upgrade() -> None:
    """Create the indexes; those of names on PostgreSQL only."""
    op.create_index("ix_users_deleted", "users", ["created_at", "id"], postgresql_where=DELETED, sqlite_where=DELETED)
    if op.get_context().dialect.name == "postgresql":
        for name, searched in NAMES.items():
            op.create_index(name, "users", [sa.text(searched)])


def downgrade() -> None:
    """Drop them."""
    if op.get_context().dialect.name == "postgresql":
        for name in NAMES:
            op.drop_index(name, "users")
    op.drop_index("ix_users_deleted", "users")
