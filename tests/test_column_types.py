"""Types of declared columns: no value causes an error, and values are read back unchanged."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase

from clerkhooks import ClerkHooks, ClerkUser, from_clerk
from clerkhooks.clerk.fake import clerk_id
from tests.application import Application, MakeApplication
from tests.backend import Backend
from tests.conftest import SLOW_ON_SQLITE
from tests.support import NOW_MS, user_event
from tests.syncing import sync

pytest_plugins = ["tests.application"]
TOKYO = timezone(timedelta(hours=9))
MOMENT = datetime.fromtimestamp(1.8e9, UTC).replace(tzinfo=None)
ID = uuid.UUID("a2345678-1234-5678-1234-56781234567f")


class Plan(enum.Enum):
    """A plan that an application sells."""

    FREE = "free"
    PRO = "pro"


class Lower(sa.types.TypeDecorator[str]):
    """A custom type that raises AttributeError for a value that is not a string."""

    impl = sa.String(4)
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: sa.Dialect) -> Any:
        """Convert to lower case."""
        return None if value is None else value.lower()


class Renamed(sa.types.TypeDecorator[str]):
    """A custom type that only renames another type."""

    impl = Lower
    cache_ok = True


TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "text": sa.Text(),
    "string": sa.String(5),
    "json": sa.JSON(),
    "jsonb": sa.JSON().with_variant(postgresql.JSONB(), "postgresql"),
    "names": sa.Enum("free", "pro", name="names"),
    "members": sa.Enum(Plan, name="members"),
    "flag": sa.Boolean(),
    "small": sa.SmallInteger(),
    "number": sa.Integer(),
    "big": sa.BigInteger(),
    "double": sa.Float(),
    "single": sa.Float(24),
    "real": sa.REAL(),
    "money": sa.Numeric(6, 2),
    "exact": sa.Numeric(),
    "inexact": sa.Numeric(6, 2, asdecimal=False),
    "moment": sa.DateTime(timezone=True),
    "naive": sa.DateTime(),
    "day": sa.Date(),
    "hour": sa.Time(),
    "key": sa.Uuid(),
    "key_text": sa.Uuid(as_uuid=False),
    "lower": Lower(),
    "renamed": Renamed(),
}


def rows_of(application: Application) -> list[Any]:
    """Return all rows as model objects."""
    with application.app.app_context():
        found = list(application.db.session.scalars(sa.select(application.model)))
        application.db.session.expunge_all()
        return found


def deliver(application: Application, **data: Any) -> Any:
    """Deliver an event about a new user, check that it is applied, and return the row."""
    user_id = clerk_id("user")
    assert application.outcome(user_event(user_id, **data)) == "applied"
    [row] = [row for row in rows_of(application) if row.id == user_id]
    return row


ODD: list[Any] = [
    *("", "free", "FREE", "x" * 3000, "nul\0", "\ud800", "12", "nan", "infinity", "-Infinity"),
    *("2026-01-01", "2026-01-01T00:00:00Z", "00:00", str(ID), str(ID).upper(), ID.hex, "{}"),
    *(True, False, 0, -1, 2**15, 2**31, 2**63, -(2**63) - 1, 10**40, 10**299, 10**400),
    *(1.5, 1e300, 3.5e38, 1e-40, 5e-324, 9999.99, 9999.994, 9999.995),
    *([], [1], [None], ["a\0"], {}, {"a": 1}, {"\ud800": 1}, {"a\0": 1}, [[[[]]]], [10**400]),
]
PARSED: dict[str, Any] = {
    "date": date.max,
    "datetime": datetime.min,  # noqa: DTZ901
    "aware": datetime(2026, 1, 1, tzinfo=TOKYO),
    "last": datetime.max.replace(tzinfo=TOKYO),
    "out of range": datetime.min.replace(tzinfo=TOKYO),
    "time": clock(1, 2),
    "aware time": clock(1, 2, tzinfo=UTC),
    "delta": timedelta.max,
    "uuid": ID,
    "bytes": b"a\0",
    "decimal": Decimal("12.34"),
    "large": Decimal("1e400"),
    "nan": Decimal("nan"),
    "signalling nan": Decimal("snan"),
    "float nan": float("nan"),
    "infinity": float("-inf"),
    "plan": Plan.PRO,
    "set": {1},
    "tuple": ("\0",),
    "object": object(),
    "class": str,
    "complex": 1j,
    "keys": {1: 2},
    "name": "FREE",
}


@pytest.mark.parametrize("parse", [None, PARSED.get], ids=["from Clerk", "from parse"])
@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_never_fails_an_event(
    make_application: MakeApplication, empty_database: str, parse: Any
) -> None:
    """No value, from Clerk or from *parse*, makes an event fail or a row unreadable."""
    columns = {name: from_clerk("value", type_, parse=parse) for name, type_ in TYPES.items()}
    application = make_application(empty_database, columns)
    values: list[Any] = list(PARSED) if parse else ODD
    for value in values:
        assert application.outcome(user_event(clerk_id("user"), value=value)) == "applied", value
    assert len(rows_of(application)) == len(values)


GOOD: dict[str, tuple[Any, Any, Any]] = {
    # Clerk's value, the parser, and the value that is read back
    "text": ("é\N{GRINNING FACE}", None, "é\N{GRINNING FACE}"),
    "string": ("12345", None, "12345"),
    "json": ({"a": [None, 1.5]}, None, {"a": [None, 1.5]}),
    "jsonb": ([{"a": 10**20}], None, [{"a": 10**20}]),
    "names": ("pro", None, "pro"),
    "members": ("pro", Plan, Plan.PRO),
    "flag": (False, None, False),
    "small": (-(2**15), None, -(2**15)),
    "number": (0, None, 0),
    "big": (2**63 - 1, None, 2**63 - 1),
    "double": (1e308, None, 1e308),
    "single": (0.25, None, 0.25),
    "real": (-3e38, None, -3e38),
    "money": (9999.994, None, Decimal("9999.99")),
    "inexact": (12.5, None, 12.5),
    "moment": (1.8e9, lambda at: datetime.fromtimestamp(at, TOKYO), MOMENT),
    "naive": (1.8e9, lambda at: datetime.fromtimestamp(at, TOKYO), MOMENT),
    "day": ("1815-12-10", date.fromisoformat, date(1815, 12, 10)),
    "hour": ("07:30:01", clock.fromisoformat, clock(7, 30, 1)),
    "key": (str(ID), uuid.UUID, ID),
    "key_text": (str(ID), None, str(ID)),
    "lower": ("abcd", None, "abcd"),
    "renamed": ("abcd", None, "abcd"),
}


@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_reads_values_back_unchanged(
    make_application: MakeApplication, empty_database: str, backend: Backend
) -> None:
    """Values are read back unchanged after a webhook or a sync; a check finds no difference."""
    columns = {name: from_clerk(name, TYPES[name], parse=GOOD[name][1]) for name in GOOD}
    application = make_application(empty_database, columns, **backend.environ)
    data = {name: sent for name, (sent, _, _) in GOOD.items()}
    ids = [backend.sign_up(at=NOW_MS - number, **data) for number in range(2)]
    application.clerk_service.deliver("user.created", backend.users[ids[0]])
    assert sync(application, backend)[0] == {"created": 1, "unchanged": 1}
    summary, findings, run = sync(application, backend, check=True)
    assert [finding.fields for finding in findings] == []
    assert (summary, run.ok) == ({"unchanged": 2}, True)
    for row in rows_of(application):
        found = {name: getattr(row, name) for name in GOOD}
        if found["moment"].tzinfo is not None:  # on PostgreSQL; SQLite stores no time zone
            found["moment"] = found["moment"].astimezone(UTC).replace(tzinfo=None)
        assert found == {name: expected for name, (_, _, expected) in GOOD.items()}


@pytest.mark.parametrize("empty_database", SLOW_ON_SQLITE, indirect=True)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("single", [3.5e38, -3.5e38, 1e-40]),
        ("real", [3.5e38, 1e-40]),
        ("money", [9999.995, -9999.995, 10**5]),
        ("inexact", [10**400, "1"]),
        ("hour", ["07:30"]),
        ("key", ["x", str(ID)]),
        ("key_text", ["x", str(ID).upper(), ID.hex]),
        ("lower", ["abcde", 5, ["a"], "\0"]),
        ("renamed", ["abcde", 5]),
        ("members", ["pro", "PRO"]),
    ],
)
def test_counts_other_values_as_absent(
    make_application: MakeApplication, empty_database: str, name: str, values: list[Any]
) -> None:
    """A value that does not fit the column's type counts as absent."""
    application = make_application(empty_database, {"value": from_clerk("value", TYPES[name])})
    for value in values:
        assert deliver(application, value=value).value is None, value


def test_limits_texts_by_the_size_of_an_index(
    make_application: MakeApplication, empty_database: str
) -> None:
    """
    The maximum size of an index entry is divided equally among the index's columns.

    Text up to a column's share is stored. Longer text counts as absent.
    """
    columns = {
        "one": from_clerk("one", sa.Text),
        "two": from_clerk("two", sa.Text),
        "__table_args__": (sa.Index("ix_both", "one", "two"),),
    }
    application = make_application(empty_database, columns)
    texts = ["".join(str(uuid.uuid4()) for _ in range(28))[:length] for length in (1000, 1001)]
    user = deliver(application, one=texts[0], two=texts[0])
    assert (user.one, user.two) == (texts[0], texts[0])
    user = deliver(application, one=texts[0], two=texts[1])
    assert (user.one, user.two) == (texts[0], None)


def test_does_not_limit_columns_of_other_indexes(
    make_application: MakeApplication, make_database: Any
) -> None:
    """Columns in a GIN or hash index accept values of any length."""
    columns = {
        "data": from_clerk("data", postgresql.JSONB),
        "note": from_clerk("note", sa.Text),
        "__table_args__": (
            sa.Index("ix_data", "data", postgresql_using="gin"),
            sa.Index("ix_note", "note", postgresql_using="hash"),
        ),
    }
    application = make_application(make_database("postgresql"), columns)
    text = "".join(str(uuid.uuid4()) for _ in range(100))
    user = deliver(application, data={"text": text}, note=text)
    assert (user.data, user.note) == ({"text": text}, text)


def declare(types: Mapping[str, Any]) -> ClerkHooks[Any]:
    """Declare a model with one column for each of *types*, and return its ``ClerkHooks``."""

    class Base(DeclarativeBase):
        """The application's declarative base."""

    db = SQLAlchemy(model_class=Base)
    columns = {name: from_clerk("value", type_) for name, type_ in types.items()}
    return ClerkHooks(db, type("User", (ClerkUser, db.Model), columns))


@pytest.mark.parametrize(
    "type_",
    [
        postgresql.INET(),
        postgresql.MONEY(),
        postgresql.DOMAIN("positive", sa.Integer()),
        postgresql.INTERVAL(),
        sa.ARRAY(sa.Text),
        sa.LargeBinary(),
        sa.Interval(),
    ],
    ids=repr,
)
def test_refuses_a_type_with_unknown_limits(type_: sa.types.TypeEngine[Any]) -> None:
    """A type with unknown limits is refused, because its values could make events fail."""
    with pytest.raises(ValueError, match=r"User\.value has an unsupported type"):
        declare({"value": type_})


def test_accepts_subtypes_and_variants() -> None:
    """Subtypes, PostgreSQL's own types, variants and type decorators are supported."""
    types = {
        "binary": postgresql.JSONB(),
        "uuid": postgresql.UUID(),
        "timestamp": postgresql.TIMESTAMP(timezone=True),
        "enum": postgresql.ENUM("a", name="enum"),
        "unicode": sa.Unicode(5),
        "decimal": sa.DECIMAL(6, 2),
    }
    assert len(declare(types | TYPES)._fields) == len(types) + len(TYPES)
