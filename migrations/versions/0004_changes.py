"""The optional table of changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from flask import current_app

from clerkhooks.store.foreign import find_changes_table

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

moment = sa.DateTime(timezone=True)
number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """
    Create the table. It stays empty unless CLERK_TABLES contains changes.

    If another program's table has its name, nothing is created.
    """
    if is_taken():
        return
    op.create_table(
        "user_changes",
        sa.Column("sequence", number, sa.Identity(), nullable=False),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False),
        sa.Column("object_type", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("fields", sa.JSON(), nullable=False),
        sa.Column("version", sa.BigInteger()),
        sa.Column("changed_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_user_changes"),
        sqlite_autoincrement=True,
    )
    index = "ix_user_changes_transaction_id_sequence"
    op.create_index(index, "user_changes", ["transaction_id", "sequence"])
    op.create_index("ix_user_changes_object_id", "user_changes", ["object_id"])


def is_taken() -> bool:
    """
    Return whether another program's table has the name.

    Raises:
        CommandError: it does, and CLERK_TABLES contains changes. The table is left unchanged.
    """
    if op.get_context().as_sql:
        return False
    connection = op.get_bind()
    found = find_changes_table(connection)
    if found is not None and current_app.extensions["clerkhooks"].store.changes is not None:
        remedy = found.remedy(connection.engine.url)
        raise CommandError(f"The database {found.describe()} Nothing was changed.\n{remedy}")
    return found is not None


def downgrade() -> None:
    """Drop the table, unless it is another program's."""
    if not op.get_context().as_sql:
        found = find_changes_table(op.get_bind())
        if found is None or found.missing:
            return
    op.drop_table("user_changes")
