"""The table of users and the log of messages."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

from clerkhooks.store.foreign import find_table

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create both tables."""
    refuse_tables_of_others()
    op.create_table(
        "users",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("email", sa.Text()),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("image_url", sa.Text()),
        sa.Column("is_online", sa.Boolean(), nullable=False),
        sa.Column("last_seen", moment, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("deleted_at", moment),
        sa.Column("banned_at", moment),
        sa.Column("deprovisioned_at", moment),
        sa.Column("locked_until", moment),
        sa.Column("version_updated_at", sa.BigInteger()),
        sa.Column("version_timestamp", sa.BigInteger()),
        sa.Column("version_message_id", bytewise),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        postgresql_with={"fillfactor": 90},  # leaves space for HOT updates
    )
    op.create_index("ix_users_email", "users", ["email"])
    op.create_index("ix_users_created_at", "users", ["created_at"])
    create_partial_index(
        "users",
        "without_profile",
        ["created_at"],
        "email IS NULL AND image_url IS NULL AND deleted_at IS NULL",
    )
    create_partial_index("users", "deleted", ["created_at"], "deleted_at IS NOT NULL")
    create_partial_index(
        "users", "barred", ["created_at"], "banned_at IS NOT NULL OR deprovisioned_at IS NOT NULL"
    )
    op.create_table(
        "webhook_messages",
        sa.Column("message_id", bytewise, nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("clerk_user_id", sa.Text()),
        sa.Column("clerk_object_id", sa.Text()),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("occurred_at", moment),
        sa.Column("received_at", moment, nullable=False),
        sa.Column("processed_at", moment),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("message_id", name="pk_webhook_messages"),
    )
    op.create_index("ix_webhook_messages_received_at", "webhook_messages", ["received_at"])
    op.create_index("ix_webhook_messages_clerk_user_id", "webhook_messages", ["clerk_user_id"])
    create_partial_index("webhook_messages", "failed", ["received_at"], "outcome = 'failed'")


def refuse_tables_of_others() -> None:
    """
    Check that clerkhooks' table names are not in use.

    Raises:
        CommandError: a table has one of these names. It is left unchanged.
    """
    if op.get_context().as_sql:
        return
    connection = op.get_bind()
    found = find_table(connection)
    if found is not None:
        remedy = found.remedy(connection.engine.url)
        raise CommandError(f"The database {found.describe()} Nothing was changed.\n{remedy}")


def create_partial_index(table: str, suffix: str, columns: list[str], condition: str) -> None:
    """Create an index on the rows that meet a condition."""
    where = sa.text(condition)
    name = f"ix_{table}_{suffix}"
    op.create_index(name, table, columns, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("webhook_messages")
    op.drop_table("users")
