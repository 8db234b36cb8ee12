"""The tables: the mixins for models, the message log, and the version columns."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import (
    Mapped,
    MappedColumn,
    Mapper,
    declared_attr,
    has_inherited_table,
    mapped_column,
)

from clerkhooks.clerk.fields import Field
from clerkhooks.store.columns import is_supported

if TYPE_CHECKING:
    from clerkhooks.store.memberships import Membership

VERSION_COLUMNS = ("version_updated_at", "version_timestamp", "version_message_id")
MESSAGES = "webhook_messages"
_FIELD = "clerkhooks.field"


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """A timezone-aware UTC time, regardless of the database and the session's time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert to UTC. A naive time is ambiguous and raises ValueError."""
        if value is not None and value.tzinfo is None:
            raise ValueError("A time without a time zone cannot be stored.")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Restore the time zone, which SQLite does not store."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def __repr__(self) -> str:
        return "DateTime(timezone=True)"


# Alembic renders the type of a column from the module and the repr of its class. With this module
# and the repr above, a generated migration contains sa.DateTime(timezone=True) and does not import
# clerkhooks.
UTCDateTime.__module__ = "sqlalchemy.types"

# Strings whose order matters are compared byte by byte, because linguistic collations differ
# between servers.
Bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


class Versioned:
    """
    Version columns. With ``upsert``, rows converge regardless of the order of events.

    The columns are NULL until an event fills the row.
    """

    version_updated_at: Mapped[int | None] = mapped_column(sa.BigInteger)
    version_timestamp: Mapped[int | None] = mapped_column(sa.BigInteger)
    version_message_id: Mapped[str | None] = mapped_column(Bytewise)


def _named(name: str) -> Any:
    """Return the declaration of a table's name. It can be overridden in a model."""

    @declared_attr.directive
    def __tablename__(cls: type[Any]) -> str | None:  # noqa: N807
        # In single-table inheritance, a derived model has no table name.
        return None if has_inherited_table(cls) else name

    return __tablename__


class ClerkUser(Versioned):
    """
    Mixin for the application's user model. Users are matched only by Clerk's id.

    The profile and the account state depend only on Clerk's data. Times are in UTC. The version
    columns are NULL until the row is filled, and again after ``user.deleted``. If a tombstone has a
    version, it was written by a sync that did not find the user. Newer data from Clerk restores
    such a user.
    """

    if TYPE_CHECKING:
        __tablename__: Any
    else:
        __tablename__ = _named("users")

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    email: Mapped[str | None] = mapped_column(sa.Text, index=True)
    name: Mapped[str] = mapped_column(sa.Text)
    image_url: Mapped[str | None] = mapped_column(sa.Text)
    is_online: Mapped[bool] = mapped_column(sa.Boolean)
    last_seen: Mapped[datetime] = mapped_column(UTCDateTime)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    if TYPE_CHECKING:

        @property
        def memberships(self) -> tuple[Membership, ...]:
            """
            The user's memberships, oldest first, loaded on first access.

            Only ``current_user`` has them, with ``CLERK_TABLES=organizations``.
            """

    banned_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    deprovisioned_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    locked_until: Mapped[datetime | None] = mapped_column(UTCDateTime)


class ClerkOrganization(Versioned):
    """
    Mixin for the application's model of organizations, which declares columns with ``from_clerk``.

    The rows follow the same rules as those of ``ClerkUser``.
    """

    if TYPE_CHECKING:
        __tablename__: Any
    else:
        __tablename__ = _named("organizations")

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    slug: Mapped[str | None] = mapped_column(sa.Text)
    image_url: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, index=True)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class ClerkMembership(Versioned):
    """
    A user's membership in an organization. A user who leaves and returns has a new one.

    The deletion of the organization or the user also deletes the membership. There is no foreign
    key, because a membership's event may arrive before those of the organization and the user. In a
    tombstone, the role is NULL. An id that no event contained is NULL until another event or a sync
    provides it.
    """

    if TYPE_CHECKING:
        __tablename__: Any
    else:
        __tablename__ = _named("organization_memberships")

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    organization_id: Mapped[str | None] = mapped_column(sa.Text, index=True)
    user_id: Mapped[str | None] = mapped_column(sa.Text, index=True)
    role: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


OWN_COLUMNS = frozenset((*ClerkUser.__annotations__, *VERSION_COLUMNS))
ORGANIZATION_COLUMNS = frozenset((*ClerkOrganization.__annotations__, *VERSION_COLUMNS))
MEMBERSHIP_COLUMNS = frozenset((*ClerkMembership.__annotations__, *VERSION_COLUMNS))


def from_clerk(
    path: str, *column: Any, parse: Callable[[Any], Any] | None = None, **options: Any
) -> MappedColumn[Any]:
    """
    Declare a column that stores a field of Clerk's object, versioned like the other columns.

    The object is a user or, in a model of organizations, an organization. *path* is a field of the
    object (``username``), a dotted path (``public_metadata.plan``), or ``primary_phone_number``.
    *parse* receives the value, which may be user input, and returns the value to store. If *parse*
    raises ValueError, or the column cannot store the value, the value counts as absent. *column*
    and *options* are passed to ``mapped_column``. The column must be nullable. Use ``sa.JSON`` for
    objects and lists.

    Raises:
        ValueError: *path* is malformed or leads into ``private_metadata``.
    """
    info = {**options.pop("info", {}), _FIELD: Field(path, parse)}
    return mapped_column(*column, info=info, **options)


def declared_fields(mapper: Mapper[Any]) -> dict[sa.Column[Any], Field]:
    """
    Return the columns that a model declares with ``from_clerk``.

    Raises:
        ValueError: a column's declaration is invalid.
    """
    is_user = issubclass(mapper.class_, ClerkUser)
    own, what = (OWN_COLUMNS, "a user") if is_user else (ORGANIZATION_COLUMNS, "an organization")
    found: dict[sa.Column[Any], Field] = {}
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if not isinstance(column, sa.Column) or column.key in own:
            continue
        where = f"{mapper.class_.__name__}.{attribute.key}"
        field = column.info.get(_FIELD)
        if field is not None:
            _check_declared(column, where)
            found[column] = field
        elif not column.nullable and column.server_default is None and column.computed is None:
            raise ValueError(
                f"{where} has no value when clerkhooks inserts {what}. "
                "Give it a server_default, or make it nullable."
            )
    return found


def _check_declared(column: sa.Column[Any], where: str) -> None:
    if not column.nullable:
        raise ValueError(
            f"{where} must be nullable, because Clerk may have no value for it. "
            "Use Mapped[… | None]."
        )
    if not is_supported(column.type):
        raise ValueError(
            f"{where} has an unsupported type: a value outside its limits would make all events of "
            "an object fail. Use text, JSON, a number, a date, Enum or Uuid."
        )
    unique: list[Any] = [index for index in column.table.indexes if index.unique]
    unique += [one for one in column.table.constraints if isinstance(one, sa.UniqueConstraint)]
    if column.unique or any(column in one.columns.values() for one in unique):
        raise ValueError(
            f"{where} must not be unique: events arrive in any order, so two rows may have the "
            "same value for a while."
        )


def make_messages_table(metadata: sa.MetaData, schema: str | None) -> sa.Table:
    """
    Return the message log's table. It contains ids, types and outcomes, but no payloads.

    Raises:
        ValueError: *metadata* already has a table with that name.
    """
    key = MESSAGES if schema is None else f"{schema}.{MESSAGES}"
    if key in metadata.tables:
        raise ValueError(
            f"The table {key!r} already exists. Use one ClerkHooks for each SQLAlchemy object."
        )
    failed = sa.text("outcome = 'failed'")
    return sa.Table(
        MESSAGES,
        metadata,
        sa.Column("message_id", Bytewise, primary_key=True),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("clerk_user_id", sa.Text),
        sa.Column("clerk_object_id", sa.Text),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("occurred_at", UTCDateTime),
        sa.Column("received_at", UTCDateTime, nullable=False),
        sa.Column("processed_at", UTCDateTime),
        sa.Column("error", sa.Text),
        sa.Index(f"ix_{MESSAGES}_received_at", "received_at"),
        sa.Index(f"ix_{MESSAGES}_clerk_user_id", "clerk_user_id"),
        sa.Index(
            f"ix_{MESSAGES}_failed", "received_at", postgresql_where=failed, sqlite_where=failed
        ),
        schema=schema,
    )


def complete_table(users: sa.Table) -> None:
    """
    Add the indexes for operators' queries, even if the model sets ``__table_args__``.

    With a HOT update, PostgreSQL does not add the new version of a row to the indexes. Therefore,
    neither the indexes nor their conditions use a column that every event writes, and a tenth of
    each page is left free for new versions, unless the model sets ``postgresql_with``.
    """
    if not users.kwargs.get("postgresql_with"):
        users.kwargs["postgresql_with"] = {"fillfactor": 90}
    wanted = {
        "created_at": None,
        "without_profile": sa.text("email IS NULL AND image_url IS NULL AND deleted_at IS NULL"),
        "deleted": sa.text("deleted_at IS NOT NULL"),
        "barred": sa.text("banned_at IS NOT NULL OR deprovisioned_at IS NOT NULL"),
    }
    present = {index.name for index in users.indexes}
    for suffix, where in wanted.items():
        name = f"ix_{users.name}_{suffix}"
        if name not in present:
            sa.Index(name, users.c.created_at, postgresql_where=where, sqlite_where=where)
