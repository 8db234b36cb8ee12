"""The change feed records each change once, in the transaction that makes it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from clerkhooks import ClerkHooks, from_clerk
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.service import db
from clerkhooks.settings import Settings
from clerkhooks.store.changes import find_difference
from tests.application import MakeApplication
from tests.backend import Backend
from tests.conftest import MakeService
from tests.racing import (
    FailingHandler,
    blocked,
    delivery,
    following,
    registered_handler,
    uncommitted_first_call,
)
from tests.support import (
    NOW_MS,
    Service,
    deletion,
    membership_event,
    organization_event,
    user_event,
)
from tests.syncing import make_old, store_of, sync

pytest_plugins = ["tests.application"]
Changes = list[tuple[Any, ...]]


@pytest.fixture
def feed(make_service: MakeService) -> Service:
    """Create the service with all optional tables."""
    return make_service(CLERK_TABLES="organizations,changes")


def changes(service: Service, object_id: str | None = None) -> Changes:
    """Return the kinds and the changed fields of an object's changes, or of all objects."""
    where = f"WHERE object_id = '{object_id}'" if object_id else ""
    query = f"SELECT kind, fields FROM user_changes {where} ORDER BY sequence"
    return [(kind, _parsed(fields)) for kind, fields in service.rows(query)]


def _parsed(fields: Any) -> list[str]:
    return sorted(json.loads(fields) if isinstance(fields, str) else fields)


def update(user_id: str, at: int, **data: Any) -> bytes:
    return user_event(user_id, at=NOW_MS + at, **data)


def test_records_each_kind_of_change(feed: Service) -> None:
    """A change names the columns that changed, and contains no values."""
    user_id = clerk_id("user")
    bodies = (
        update(user_id, 1),
        update(user_id, 2, first_name="Augusta"),
        update(user_id, 3, first_name="Augusta", banned=True),
        update(user_id, 4, first_name="Augusta"),
        deletion(user_id, NOW_MS + 5),
    )
    for body in bodies:
        assert feed.outcome(body) == "applied"
    assert changes(feed, user_id) == [
        ("created", ["email", "image_url", "name"]),
        ("updated", ["name"]),
        ("barred", ["banned_at"]),
        ("restored", ["banned_at"]),
        ("deleted", ["email", "image_url", "name"]),
    ]
    [(object_type, version)] = feed.rows(
        "SELECT object_type, version FROM user_changes WHERE kind = 'restored'"
    )
    assert (object_type, version) == ("user", NOW_MS + 4)


def test_records_a_deletion_that_comes_first(feed: Service) -> None:
    user_id = clerk_id("user")
    feed.deliver(deletion(user_id))
    assert changes(feed, user_id) == [("deleted", ["name"])]


def test_records_the_row_of_a_first_call_and_its_profile(feed: Service) -> None:
    user_id = clerk_id("user")
    feed.call(user_id)
    feed.call(user_id)
    feed.deliver(update(user_id, 1))
    assert changes(feed, user_id) == [
        ("created", ["name"]),
        ("filled", ["email", "image_url", "name"]),
    ]


def test_records_nothing_if_no_value_changes(feed: Service) -> None:
    """Duplicates, stale events and newer events with the same values are no changes."""
    user_id = clerk_id("user")
    feed.deliver(update(user_id, 5), "msg_1")
    before = changes(feed)
    outcomes = [
        feed.outcome(update(user_id, 5), "msg_1"),
        feed.outcome(update(user_id, 4, first_name="Old")),
        feed.outcome(update(user_id, 6)),
    ]
    assert outcomes == ["duplicate", "stale", "applied"]
    assert changes(feed) == before


def test_records_nothing_unless_it_is_on(service: Service) -> None:
    service.deliver(update(clerk_id("user"), 1))
    assert changes(service) == []


def test_records_nothing_of_a_failed_message(feed: Service) -> None:
    user_id = clerk_id("user")
    with registered_handler(feed.app, FailingHandler(always=True)):
        assert feed.deliver(update(user_id, 1)).status_code == 500
    assert changes(feed) == []
    with registered_handler(feed.app, print):
        feed.deliver(update(user_id, 1))
    assert [kind for kind, _ in changes(feed)] == ["created"]


def test_records_one_change_of_a_new_user_with_handlers_of_the_account_state(
    feed: Service,
) -> None:
    """Such a row is inserted before the event is applied, to lock it."""
    user_id = clerk_id("user")
    with following(feed):
        feed.deliver(update(user_id, 1, banned=True))
    assert [kind for kind, _ in changes(feed)] == ["created"]


def test_records_the_old_values_of_a_row_that_is_inserted_concurrently(feed: Service) -> None:
    """The event waits for the first call, and then fills its row."""
    user_id = clerk_id("user")
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    with (
        uncommitted_first_call(feed, user_id) as commit,
        blocked(feed, delivery(feed, update(user_id, 1))) as answer,
    ):
        commit()
        assert answer.result(20).get_json()["outcome"] == "applied"
    assert [kind for kind, _ in changes(feed)] == ["filled"]


def test_fails_if_a_missing_row_cannot_be_inserted(feed: Service) -> None:
    """For example, because of another program's trigger. Svix retries the message."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("a trigger of SQLite cannot suppress a row")
    feed.rows(
        "CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    feed.rows(
        "CREATE TRIGGER suppress BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION suppress()"
    )
    try:
        assert feed.deliver(update(clerk_id("user"), 1)).status_code == 500
    finally:
        feed.rows("DROP FUNCTION suppress CASCADE")


def test_records_the_end_of_memberships(feed: Service) -> None:
    """The memberships of a deleted organization end, also those that arrive later."""
    user_id, organization_id = clerk_id("user"), clerk_id("org")
    first, late = ((clerk_id("orgmem"), organization_id, user_id) for _ in range(2))
    for body in (
        update(user_id, 1),
        organization_event(organization_id),
        membership_event(first),
        organization_event(organization_id, "deleted"),
        membership_event(late),
    ):
        feed.deliver(body)
    found = feed.rows("SELECT object_type, kind FROM user_changes ORDER BY sequence")
    assert found == [
        ("user", "created"),
        ("organization", "created"),
        ("organizationMembership", "created"),
        ("organization", "deleted"),
        ("organizationMembership", "deleted"),
        ("organizationMembership", "created"),
        ("organizationMembership", "deleted"),
    ]


def test_records_the_changes_of_a_sync(make_service: MakeService, backend: Backend) -> None:
    """A second sync finds nothing to change."""
    service = make_service(CLERK_TABLES="changes", **backend.environ)
    created, updated, deleted = (clerk_id("user") for _ in range(3))
    service.deliver(user_event(updated, at=NOW_MS - 9000, first_name="Old"))
    service.deliver(user_event(deleted, at=NOW_MS - 9000))
    make_old(service)
    for user_id in (created, updated):
        backend.sign_up(user_id)
    service.rows("DELETE FROM user_changes")
    for _ in range(2):
        sync(service, backend)
    kinds = {
        object_id: changes(service, object_id)[0][0] for object_id in (created, updated, deleted)
    }
    assert kinds == {created: "created", updated: "updated", deleted: "deleted"}
    assert len(changes(service)) == 3
    backend.sign_up(deleted)
    sync(service, backend)
    assert [kind for kind, _ in changes(service, deleted)] == ["deleted", "revived"]


def test_records_declared_columns_of_an_application(
    make_application: MakeApplication, empty_database: str
) -> None:
    """The application's metadata contains the table. JSON is compared without regard to order."""
    columns = {
        "username": from_clerk("username", sa.Text),
        "metadata_": from_clerk("public_metadata", sa.JSON),
    }
    application = make_application(empty_database, columns, CLERK_TABLES="changes")
    user_id = clerk_id("user")
    for at, username, metadata in (
        (1, "ada", {"plan": "free", "seats": 1}),
        (2, "ada", {"seats": 1, "plan": "free"}),
        (3, "augusta", {"plan": "pro", "seats": 1}),
    ):
        body = update(user_id, at, username=username, public_metadata=metadata)
        assert application.outcome(body) == "applied"
    found = application.rows("SELECT fields FROM user_changes ORDER BY sequence")
    assert [_parsed(fields) for (fields,) in found] == [
        ["email", "image_url", "metadata_", "name", "username"],
        ["metadata_", "username"],
    ]


def test_refuses_a_name_that_is_in_use() -> None:
    class Base(DeclarativeBase):
        """The declarative base."""

    db = SQLAlchemy(model_class=Base)
    db.Table("user_changes", sa.Column("id", sa.Integer))
    with pytest.raises(ValueError, match="'user_changes' already exists"):
        ClerkHooks(db)._find_changes(Settings(webhook_secrets=(), tables=("changes",)))


def test_commits_with_the_usual_lock_timeout(feed: Service) -> None:
    """Commits with notifications may wait for each other longer than for a row's lock."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no notifications")
    engine, timeouts = store_of(feed).database.engine, list[Any]()

    def note(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if statement == "COMMIT":
            timeouts.append(cursor.connection.execute("SHOW lock_timeout").fetchone())

    sa.event.listen(engine, "before_cursor_execute", note)
    feed.deliver(update(clerk_id("user"), 1))
    assert timeouts == [("2s",)]


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        (True, 1, True),
        ({"beta": [True]}, {"beta": [1]}, True),
        ({"beta": 0, "plan": "pro"}, {"plan": "pro", "beta": 0}, False),
        ([Decimal("0.1")], [Decimal("0.1")], False),
        (None, False, True),
    ],
)
def test_compares_json_values(before: Any, after: Any, differs: bool) -> None:
    """In Python, true equals 1, and a driver may decode numbers as Decimal."""
    row = {"id": "user_1", "deleted_at": None, "version_updated_at": 1}
    found = find_difference(["data"], row | {"data": before}, row | {"data": after})
    assert (found == ("updated", ["data"])) == differs


def test_does_not_notify_in_a_two_phase_transaction(feed: Service) -> None:
    """PostgreSQL could not prepare it, so all events with handlers would fail."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no two-phase transactions")
    statements, executed = store_of(feed).statements, list[str]()

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        executed.append(statement)

    with feed.app.app_context(), db.engine.connect() as connection:
        sa.event.listen(connection, "before_cursor_execute", note)
        with connection.begin_twophase() as transaction:
            statements.create(connection, clerk_id("user"), datetime.now(UTC))
            transaction.rollback()
    assert any("INTO user_changes" in statement for statement in executed)
    assert not any("pg_notify" in statement for statement in executed)
