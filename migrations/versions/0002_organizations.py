"""The optional tables of organizations and memberships."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from flask import current_app

from clerkhooks.store.foreign import find_optional_table

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    """
    Create both tables. They stay empty unless CLERK_TABLES is set.

    They are created anyway, so that the variable can be set later without another migration. If
    another program's tables have these names, nothing is created.
    """
    if is_taken():
        return
    op.create_table(
        "organizations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("slug", sa.Text()),
        sa.Column("image_url", sa.Text()),
        *common_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_organizations"),
    )
    op.create_index("ix_organizations_created_at", "organizations", ["created_at"])
    op.create_table(
        "organization_memberships",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("organization_id", sa.Text()),
        sa.Column("user_id", sa.Text()),
        sa.Column("role", sa.Text()),
        *common_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_organization_memberships"),
    )
    for name in ("organization_id", "user_id"):
        index = f"ix_organization_memberships_{name}"
        op.create_index(index, "organization_memberships", [name])
    live = sa.text("deleted_at IS NULL")
    for table in ("organizations", "organization_memberships"):
        name = f"ix_{table}_live"
        op.create_index(name, table, ["deleted_at"], postgresql_where=live, sqlite_where=live)


def common_columns() -> list[sa.Column[object]]:
    """Return the columns for times and the version."""
    return [
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("deleted_at", moment),
        sa.Column("version_updated_at", sa.BigInteger()),
        sa.Column("version_timestamp", sa.BigInteger()),
        sa.Column("version_message_id", bytewise),
    ]


def is_taken() -> bool:
    """
    Return whether another program's table has one of the names.

    Raises:
        CommandError: it does, and CLERK_TABLES is set. The table is left unchanged.
    """
    if op.get_context().as_sql:
        return False
    connection = op.get_bind()
    found = find_optional_table(connection)
    if found is not None and current_app.extensions["clerkhooks"].store.endings is not None:
        remedy = found.remedy(connection.engine.url)
        raise CommandError(f"The database {found.describe()} Nothing was changed.\n{remedy}")
    return found is not None


def downgrade() -> None:
    """Drop both tables, unless another program's table has one of the names."""
    if not op.get_context().as_sql:
        found = find_optional_table(op.get_bind())
        if found is None or found.missing:
            return
    op.drop_table("organization_memberships")
    op.drop_table("organizations")
