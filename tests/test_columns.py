"""Declared columns: fields of Clerk's user object that webhooks and syncs store."""

from __future__ import annotations

import enum
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import mapped_column

from clerkhooks import ClerkHooks, ClerkUser, from_clerk
from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.web.state import disconnect
from tests.application import Application, MakeApplication
from tests.backend import Backend
from tests.conftest import KINDS, SLOW_ON_POSTGRESQL, MakeDatabase
from tests.support import NOW_MS, deletion, user_event
from tests.syncing import make_old, sync

pytest_plugins = ["tests.application"]
HUGE = "1e999"  # valid JSON that Python parses as infinity


class Color(enum.Enum):
    """An enumeration whose names and values differ."""

    RED = "r"
    GREEN = "g"


def parse_moment(milliseconds: Any) -> datetime:
    """
    Convert Clerk's time to a datetime.

    Raises TypeError, ValueError or OverflowError for other values.
    """
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def fail_to_parse(value: Any) -> Any:
    """Raise the exception that *value* names, as a faulty parser might."""
    raise {"type": TypeError, "key": KeyError, "index": IndexError, "value": ValueError}[value](
        "ada@example.org"
    )


def make_columns() -> dict[str, Any]:
    """Return a column of each kind."""
    public = "public_metadata"
    return {
        "username": from_clerk("username", sa.Text),
        "plan": from_clerk(f"{public}.plan", sa.Text),
        "short": from_clerk(f"{public}.short", sa.String(5)),
        "indexed": from_clerk(f"{public}.indexed", sa.Text, index=True),
        "phone": from_clerk("primary_phone_number", sa.Text),
        "metadata_": from_clerk(public, sa.JSON),
        "settings": from_clerk("unsafe_metadata", sa.JSON().with_variant(JSONB(), "postgresql")),
        "small": from_clerk(f"{public}.small", sa.SmallInteger),
        "number": from_clerk(f"{public}.number", sa.Integer),
        "big": from_clerk(f"{public}.big", sa.BigInteger),
        "share": from_clerk(f"{public}.share", sa.Float),
        "price": from_clerk(f"{public}.price", sa.Numeric(6, 2)),
        "exact": from_clerk(f"{public}.exact", sa.Numeric(6, 2), parse=Decimal),
        "is_staff": from_clerk(f"{public}.staff", sa.Boolean),
        "size": from_clerk(f"{public}.size", sa.Enum("small", "large", name="size")),
        "color": from_clerk(f"{public}.color", sa.Enum(Color), parse=Color),
        "unparsed_color": from_clerk(f"{public}.color", sa.Enum(Color)),
        "signed_in_at": from_clerk(
            "last_sign_in_at", sa.DateTime(timezone=True), parse=parse_moment
        ),
        "began_at": from_clerk(
            f"{public}.began", sa.DateTime(timezone=True), parse=datetime.fromisoformat
        ),
        "birthday": from_clerk("birthday", sa.Date, parse=date.fromisoformat),
        "reference": from_clerk(f"{public}.reference", sa.Uuid, parse=uuid.UUID),
        "clumsy": from_clerk(f"{public}.clumsy", sa.Text, parse=fail_to_parse),
        "Select": from_clerk(f"{public}.select", sa.Text),
        "tier": mapped_column(sa.Text, server_default="free"),
    }


@pytest.fixture(scope="module", params=KINDS)
def wide(
    request: pytest.FixtureRequest, clerk: FakeClerk, make_database: MakeDatabase
) -> Iterator[Application]:
    """Create an application with the columns of ``make_columns``, on each kind of database."""
    application = Application(clerk, make_database(request.param), make_columns())
    application.create_all()
    yield application
    disconnect(application.app)


def read(application: Application, user_id: str) -> Any:
    """Return a user's row, detached from its session."""
    with application.app.app_context():
        return application.db.session.get_one(application.model, user_id)


def patch(path: str, text: str) -> bytes:
    """Return an event about a new user, with *text* (JSON) as the value at *path*."""
    data = user_data(
        clerk_id("user"),
        email="ada@example.org",
        first_name="Ada",
        last_name="Lovelace",
        updated_at=NOW_MS,
    )
    first, _, second = path.partition(".")
    data[first] = {second: "@"} if second else "@"
    body = event_body("user.created", data, NOW_MS)
    return body.replace(b'"@"', text.encode(), 1)


def user_id_of(body: bytes) -> str:
    """Return the user's id from the body of an event."""
    return str(json.loads(body)["data"]["id"])


def nested(depth: int) -> str:
    """Return *depth* nested lists as JSON."""
    return "[" * depth + "]" * depth


incompressible = "".join(sha256(bytes([number])).hexdigest() for number in range(100))
MOMENT = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)

CASES: list[tuple[str, str, str, Any]] = [
    # column, path, JSON, stored value
    ("username", "username", '"ada"', "ada"),
    ("username", "username", '"\U0001f469 \\u00e9"', "\U0001f469 é"),
    ("username", "username", '"quoted \\" and \\\\ and $.%(x)s :x"',
     'quoted " and \\ and $.%(x)s :x'),
    ("username", "username", "null", None),
    ("username", "username", "5", None),
    ("username", "username", "true", None),
    ("username", "username", '["ada"]', None),
    ("username", "username", '"a\\u0000b"', None),
    ("username", "username", '"a\\ud800b"', None),
    ("username", "username", '"' + "x" * 100_000 + '"', "x" * 100_000),
    ("Select", "public_metadata.select", '"quoted name"', "quoted name"),
    ("plan", "public_metadata.plan", '"pro"', "pro"),
    ("plan", "public_metadata.plan", '{"name": "pro"}', None),
    ("plan", "public_metadata", '"pro"', None),
    ("plan", "public_metadata", "null", None),
    ("plan", "public_metadata", '[{"plan": "pro"}]', None),
    ("short", "public_metadata.short", '"12345"', "12345"),
    ("short", "public_metadata.short", '"\U0001f469\U0001f469\U0001f469\U0001f469\U0001f469"',
     "\U0001f469" * 5),
    ("short", "public_metadata.short", '"123456"', None),
    ("indexed", "public_metadata.indexed", f'"{incompressible[:2000]}"', incompressible[:2000]),
    ("indexed", "public_metadata.indexed", f'"{incompressible[:2001]}"', None),
    ("indexed", "public_metadata.indexed", f'"{incompressible[:3000]}"', None),
    ("indexed", "public_metadata.indexed", '"' + "é" * 1001 + '"', None),
    ("metadata_", "public_metadata", '{"plan": ["a", 1, 1.5, true, null, {}]}',
     {"plan": ["a", 1, 1.5, True, None, {}]}),
    ("metadata_", "public_metadata", '{"é\U0001f469\\"": "\\\\"}', {'é\U0001f469"': "\\"}),
    ("metadata_", "public_metadata", '["plan"]', ["plan"]),
    ("metadata_", "public_metadata", '"plan"', "plan"),
    ("metadata_", "public_metadata", '{"n": 12345678901234567890123}',
     {"n": 12345678901234567890123}),
    ("metadata_", "public_metadata", "null", None),
    ("metadata_", "public_metadata", '{"a\\u0000": 1}', None),
    ("metadata_", "public_metadata", '{"a": ["b\\ud800"]}', None),
    ("metadata_", "public_metadata", f'{{"a": {HUGE}}}', None),
    ("metadata_", "public_metadata", nested(150), json.loads(nested(150))),
    ("metadata_", "public_metadata", nested(300), None),
    ("settings", "unsafe_metadata", '{"theme": "dark"}', {"theme": "dark"}),
    ("settings", "unsafe_metadata", '{"theme": "\\u0000"}', None),
    ("settings", "unsafe_metadata", f"[-{HUGE}]", None),
    ("small", "public_metadata.small", "32767", 32767),
    ("small", "public_metadata.small", "32768", None),
    ("number", "public_metadata.number", "2147483647", 2**31 - 1),
    ("number", "public_metadata.number", "2147483648", None),
    ("number", "public_metadata.number", "-2147483648", -(2**31)),
    ("number", "public_metadata.number", "-2147483649", None),
    ("number", "public_metadata.number", "true", None),
    ("number", "public_metadata.number", "1.5", None),
    ("number", "public_metadata.number", '"5"', None),
    ("number", "public_metadata.number", HUGE, None),
    ("number", "public_metadata.number", "9" * 400, None),
    ("big", "public_metadata.big", "9223372036854775807", 2**63 - 1),
    ("big", "public_metadata.big", "-9223372036854775808", -(2**63)),
    ("big", "public_metadata.big", "9223372036854775808", None),
    ("share", "public_metadata.share", "0.1", 0.1),
    ("share", "public_metadata.share", "3", 3.0),
    ("share", "public_metadata.share", HUGE, None),
    ("share", "public_metadata.share", f"-{HUGE}", None),
    ("share", "public_metadata.share", "9" * 320, None),
    ("price", "public_metadata.price", "9999.99", Decimal("9999.99")),
    ("price", "public_metadata.price", "-9999.99", Decimal("-9999.99")),
    ("price", "public_metadata.price", "10000", None),
    ("price", "public_metadata.price", "9999.999", None),
    ("price", "public_metadata.price", HUGE, None),
    ("price", "public_metadata.price", '"12.5"', None),
    ("exact", "public_metadata.exact", '"12.34"', Decimal("12.34")),
    ("exact", "public_metadata.exact", '"twelve"', None),
    ("exact", "public_metadata.exact", '"Infinity"', None),
    ("exact", "public_metadata.exact", '"NaN"', None),
    ("exact", "public_metadata.exact", "{}", None),
    ("is_staff", "public_metadata.staff", "true", True),
    ("is_staff", "public_metadata.staff", "false", False),
    ("is_staff", "public_metadata.staff", "1", None),
    ("is_staff", "public_metadata.staff", '"true"', None),
    ("size", "public_metadata.size", '"large"', "large"),
    ("size", "public_metadata.size", '"huge"', None),
    ("size", "public_metadata.size", '["large"]', None),
    ("color", "public_metadata.color", '"r"', Color.RED),
    ("color", "public_metadata.color", '"RED"', None),
    ("color", "public_metadata.color", "{}", None),
    ("unparsed_color", "public_metadata.color", '"RED"', None),
    ("signed_in_at", "last_sign_in_at", "1700000000000", MOMENT),
    ("signed_in_at", "last_sign_in_at", '"yesterday"', None),
    ("signed_in_at", "last_sign_in_at", "1e300", None),
    ("signed_in_at", "last_sign_in_at", HUGE, None),
    ("began_at", "public_metadata.began", '"2023-11-15T00:13:20+02:00"', MOMENT),
    ("began_at", "public_metadata.began", '"2023-11-14T22:13:20"', None),
    ("began_at", "public_metadata.began", '"0001-01-01T00:00:00+14:00"', None),
    ("birthday", "birthday", '"1815-12-10"', date(1815, 12, 10)),
    ("birthday", "birthday", '"1815-02-30"', None),
    ("birthday", "birthday", "1815", None),
    ("reference", "public_metadata.reference", '"0d9ad5f5-6d0e-4a4b-9a7b-6a5d0f0e7c11"',
     uuid.UUID("0d9ad5f5-6d0e-4a4b-9a7b-6a5d0f0e7c11")),
    ("reference", "public_metadata.reference", '"0d9ad5f5"', None),
    ("clumsy", "public_metadata.clumsy", '"value"', None),
    ("clumsy", "public_metadata.clumsy", '"type"', None),
    ("clumsy", "public_metadata.clumsy", '"index"', None),
]  # fmt: skip


def shorten(value: object) -> str:
    """Return *value* as a short test id."""
    return str(value)[:24]


@pytest.mark.parametrize(("column", "path", "text", "expected"), CASES, ids=shorten)
def test_stores_valid_values(
    wide: Application, backend: Backend, column: str, path: str, text: str, expected: Any
) -> None:
    """
    A value that the column cannot store counts as absent and causes no error.

    The profile is stored either way, and a later sync changes nothing.
    """
    body = patch(path, text)
    user_id = user_id_of(body)
    assert wide.outcome(body) == "applied"
    row = read(wide, user_id)
    value = getattr(row, column)
    if isinstance(value, datetime) and value.tzinfo is None:  # SQLite stores no time zone
        value = value.replace(tzinfo=UTC)
    assert value == expected
    assert type(value) is type(expected)
    assert (row.email, row.name, row.tier) == ("ada@example.org", "Ada Lovelace", "free")
    if HUGE in text:
        return  # the fake backend cannot send infinity as JSON
    backend.users[user_id] = json.loads(body)["data"]
    summary, findings, run = sync(wide, backend, lambda run: run.sync_some([user_id]), check=True)
    assert (summary, findings, run.ok) == ({"unchanged": 1}, [], True)
    backend.users[user_id]["updated_at"] = NOW_MS + 1
    assert sync(wide, backend, lambda run: run.sync_some([user_id]))[0] == {"unchanged": 1}
    assert getattr(read(wide, user_id), column) == getattr(row, column)


def test_logs_parser_errors_without_the_value(
    wide: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A ValueError is not logged. For other exceptions, only the name of the class is logged.

    ``Decimal`` raises InvalidOperation, which is not a ValueError.
    """
    with caplog.at_level(logging.WARNING, logger="clerkhooks"):
        assert wide.outcome(patch("public_metadata.clumsy", '"value"')) == "applied"
        assert not [one for one in caplog.records if one.getMessage() == "column_not_parsed"]
        assert wide.outcome(patch("public_metadata.clumsy", '"key"')) == "applied"
        assert wide.outcome(patch("public_metadata.exact", '"twelve"')) == "applied"
    records = [vars(one) for one in caplog.records if one.getMessage() == "column_not_parsed"]
    assert [(record["column"], record["error"]) for record in records] == [
        ("clumsy", "KeyError"),
        ("exact", "InvalidOperation"),
    ]
    assert "example.org" not in str(records)
    assert "twelve" not in str(records)


PHONES = [
    {"id": "idn_1", "phone_number": "+15550100"},
    {"id": "idn_2", "phone_number": "+15550101"},
]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"phone_numbers": PHONES, "primary_phone_number_id": "idn_2"}, "+15550101"),
        ({"phone_numbers": PHONES, "primary_phone_number_id": "idn_3"}, None),
        ({"phone_numbers": PHONES, "primary_phone_number_id": None}, None),
        ({"phone_numbers": [5, *PHONES], "primary_phone_number_id": "idn_1"}, "+15550100"),
        ({"phone_numbers": "x", "primary_phone_number_id": "idn_1"}, None),
        ({"phone_numbers": [{"id": "idn_1"}], "primary_phone_number_id": "idn_1"}, None),
    ],
)
def test_finds_the_primary_phone_number(
    wide: Application, data: Mapping[str, Any], expected: str | None
) -> None:
    """The path ``primary_phone_number`` selects the number with the primary id."""
    user_id = clerk_id("user")
    assert wide.outcome(user_event(user_id, **data)) == "applied"
    assert read(wide, user_id).phone == expected


def test_orders_columns_like_the_profile(wide: Application) -> None:
    """
    The newest event sets every declared column, even if a field is absent from the event.

    The application's own columns stay unchanged.
    """
    user_id = clerk_id("user")
    assert wide.outcome(user_event(user_id, at=2000, username="new")) == "applied"
    wide.rows(f"UPDATE users SET tier = 'gold' WHERE id = '{user_id}'")
    stale = user_event(user_id, at=1000, username="old", public_metadata={"plan": "pro"})
    assert wide.outcome(stale) == "stale"
    row = read(wide, user_id)
    assert (row.username, row.plan, row.tier) == ("new", None, "gold")
    assert wide.outcome(user_event(user_id, at=3000, public_metadata={"plan": "pro"})) == "applied"
    row = read(wide, user_id)
    assert (row.username, row.plan, row.tier) == (None, "pro", "gold")


def test_erases_columns_of_a_deleted_user(wide: Application, backend: Backend) -> None:
    """A deletion erases the declared columns, but not the application's own columns."""
    deleted_id, gone_id = clerk_id("user"), clerk_id("user")
    whole: dict[str, Any] = {
        "username": "ada",
        "birthday": "1815-12-10",
        "public_metadata": {"plan": "pro", "number": 5, "color": "r"},
    }
    for user_id in (deleted_id, gone_id):
        assert wide.outcome(user_event(user_id, at=1000, **whole)) == "applied"
        assert read(wide, user_id).plan == "pro"
    assert wide.outcome(deletion(deleted_id)) == "applied"
    make_old(wide)
    summary, _, _ = sync(wide, backend, lambda run: run.sync_some([gone_id]))
    assert summary == {"tombstoned": 1}
    for user_id in (deleted_id, gone_id):
        row = read(wide, user_id)
        kept = [column.key for column in sa.inspect(wide.model).columns if column.info]
        assert len(kept) == len(make_columns()) - 1
        assert {name: getattr(row, name) for name in kept if getattr(row, name) is not None} == {}
        assert (row.name, row.tier, row.deleted_at is None) == ("Deleted User", "free", False)


def test_gives_columns_to_views(wide: Application) -> None:
    """``current_user`` has the declared columns, with the model's types."""
    body = patch("public_metadata.color", '"g"')
    wide.outcome(body)
    users = wide.state.users
    user, created = users.get_authenticated(user_id_of(body), impersonated=False)
    assert (vars_of(user, "color", "tier"), created) == ((Color.GREEN, "free"), False)
    new, created = users.get_authenticated(clerk_id("user"), impersonated=False)
    assert (vars_of(new, "color", "tier"), created) == ((None, "free"), True)


def vars_of(user: Any, *names: str) -> tuple[Any, ...]:
    """Return the values of the named attributes."""
    return tuple(getattr(user, name) for name in names)


@pytest.mark.parametrize("empty_database", SLOW_ON_POSTGRESQL, indirect=True)
@pytest.mark.parametrize(
    ("here", "at_clerk", "expected", "result"),
    [
        (1000, 1000, "pro", "updated"),
        (1000, 2000, "pro", "updated"),
        (2000, 1000, None, "newer_here"),
    ],
    ids=["equal", "newer", "older"],
)
@pytest.mark.parametrize("by", ["webhook", "sync"])
def test_fills_a_column_declared_later(
    make_application: MakeApplication,
    empty_database: str,
    backend: Backend,
    by: str,
    here: int,
    at_clerk: int,
    expected: str | None,
    result: str,
) -> None:
    """
    A sync fills a new column if Clerk's ``updated_at`` is not older than the row's.

    Afterwards, older events are still stale, and newer events are applied.
    """
    user_id = backend.sign_up(at=1000, public_metadata={"plan": "pro"})
    before = make_application(empty_database)
    backend.update(user_id, updated_at=here)
    if by == "webhook":
        body = event_body("user.updated", backend.users[user_id], here)
        assert before.outcome(body, "msg_1") == "applied"
    else:
        assert sync(before, backend)[0] == {"created": 1}
    backend.update(user_id, updated_at=at_clerk)
    before.rows("ALTER TABLE users ADD COLUMN plan TEXT")
    after = make_application(empty_database, {"plan": from_clerk("public_metadata.plan", sa.Text)})
    assert read(after, user_id).plan is None
    check = sync(after, backend, check=True)[2]
    assert check.drifted == (1 if expected else 0)
    assert sync(after, backend)[0] == {result: 1}
    assert read(after, user_id).plan == expected
    assert sync(after, backend)[0] == {"unchanged" if expected else "newer_here": 1}
    older = user_event(user_id, at=min(here, at_clerk) - 1, public_metadata={"plan": "old"})
    assert after.outcome(older) == "stale"
    newer = user_event(user_id, at=3000, public_metadata={"plan": "new"})
    assert after.outcome(newer) == "applied"
    assert read(after, user_id).plan == "new"


def test_does_not_overwrite_a_newer_webhook(
    make_application: MakeApplication, empty_database: str, backend: Backend
) -> None:
    """A sync does not undo a webhook that clears a field or deletes a user during the sync."""
    ids = [backend.sign_up(at=1000, public_metadata={"plan": "pro"}) for _ in range(2)]
    application = make_application(
        empty_database, {"plan": from_clerk("public_metadata.plan", sa.Text)}
    )
    cleared, deleted = ids
    for user_id in ids:
        application.outcome(event_body("user.created", backend.users[user_id], 1000))
        application.rows("UPDATE users SET plan = NULL")
    done: list[bool] = []

    def deliver_meanwhile(*_: object) -> None:
        if not done:
            done.append(True)
            assert application.outcome(user_event(cleared, at=2000)) == "applied"
            assert application.outcome(deletion(deleted)) == "applied"

    backend.before = deliver_meanwhile
    assert sync(application, backend)[0] == {"newer_here": 2}
    assert [read(application, user_id).plan for user_id in ids] == [None, None]


def declare(**columns: Any) -> ClerkHooks[Any]:
    """Declare a model with these columns."""
    db = SQLAlchemy()
    parents: tuple[Any, ...] = (ClerkUser, db.Model)
    return ClerkHooks(db, type("User", parents, {"__module__": __name__, **columns}))


@pytest.mark.parametrize("path", ["private_metadata", "private_metadata.plan"])
def test_refuses_private_metadata(path: str) -> None:
    """A column for private metadata is refused, because the metadata may contain secrets."""
    with pytest.raises(ValueError, match="Use public_metadata"):
        from_clerk(path, sa.JSON)


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", "a b", "public metadata.plan", 5])
def test_refuses_a_malformed_path(path: Any) -> None:
    """A malformed path, which could never have a value, raises ValueError."""
    with pytest.raises(ValueError, match="is not a path"):
        from_clerk(path)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"username": from_clerk("username", sa.Text, unique=True)}, "must not be unique"),
        (
            {
                "username": from_clerk("username", sa.Text),
                "__table_args__": (sa.Index("ix", "username", unique=True),),
            },
            "must not be unique",
        ),
        (
            {
                "username": from_clerk("username", sa.Text),
                "__table_args__": (sa.UniqueConstraint("username", "name"),),
            },
            "must not be unique",
        ),
        ({"username": from_clerk("username", sa.Text, nullable=False)}, "must be nullable"),
        ({"username": from_clerk("username", sa.Interval)}, "limits"),
        ({"tier": mapped_column(sa.Text, nullable=False)}, "server_default"),
    ],
    ids=["unique", "unique index", "unique constraint", "not null", "type", "own without default"],
)
def test_refuses_a_column_that_would_fail_events(columns: dict[str, Any], reason: str) -> None:
    """
    A column that could reject a valid event is refused when the model is declared.

    Events arrive in any order and may lack any field.
    """
    with pytest.raises(ValueError, match=reason):
        declare(**columns)


def test_accepts_own_columns_with_a_default_or_null() -> None:
    """An application's own column is accepted if it is nullable or has a server default."""
    declare(
        tier=mapped_column(sa.Text, nullable=False, server_default="free"),
        note=mapped_column(sa.Text, unique=True),
    )


@pytest.mark.parametrize(
    "text", ["1E-9999999", "1E-999999999", "1E-20000", "0E-999999", "1E+99999"]
)
@pytest.mark.parametrize("type_", [sa.Numeric(10, 2), sa.Numeric()])
def test_ignores_a_number_with_too_many_digits(
    make_application: MakeApplication, empty_database: str, text: str, type_: sa.Numeric[Any]
) -> None:
    """A number with too many digits takes little CPU time and does not make the event fail."""
    column = from_clerk("unsafe_metadata.p", type_, nullable=True, parse=Decimal)
    application = make_application(empty_database, {"price": column})
    user_id = clerk_id("user")
    started = time.process_time()
    assert application.outcome(user_event(user_id, unsafe_metadata={"p": text})) == "applied"
    assert time.process_time() - started < 2
    assert application.user(user_id, ["price"]) == (None,)
