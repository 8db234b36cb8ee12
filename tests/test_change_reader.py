"""Readers of the change feed miss no change, however late its transaction commits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from werkzeug.test import TestResponse

from clerkhooks import SettingsError, create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.doctor import Level, change_feed
from clerkhooks.doctor.change_feed import judge_changes
from clerkhooks.doctor.database import judge_database
from clerkhooks.errors import ChangesPruned, ChangesRestored
from clerkhooks.settings import PROJECT, Settings
from clerkhooks.store.change_reader import START, ChangeReader, Cursor
from clerkhooks.web import changes as route
from tests.conftest import MakeService
from tests.racing import eventually
from tests.support import NOW_MS, Service, ThreadPool, user_event
from tests.syncing import store_of

TOKEN = "a-token-for-the-feed"
SETTINGS = Settings(webhook_secrets=())
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def feed(make_service: MakeService) -> Service:
    """Create the service with the change feed and its route."""
    return make_service(CLERK_TABLES="changes", CHANGES_TOKEN=TOKEN)


@pytest.fixture
def reader(feed: Service) -> ChangeReader:
    """Return a reader of the service's change feed."""
    return ChangeReader(store_of(feed))


def sign_up(service: Service, count: int = 1) -> list[str]:
    """Deliver an event for each of *count* new users; return their ids."""
    user_ids = [clerk_id("user") for _ in range(count)]
    for number, user_id in enumerate(user_ids):
        assert service.outcome(user_event(user_id, at=NOW_MS + number)) == "applied"
    return user_ids


def get(service: Service, **query: Any) -> TestResponse:
    """Request the feed with the right token."""
    return service.http.get("/changes", query_string=query, headers=HEADERS)


@contextmanager
def other_transaction(service: Service) -> Iterator[psycopg.Connection]:
    """Run a transaction that has an id but has not ended, as any other program may."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    with closing(psycopg.connect(service.database_url)) as connection:
        connection.execute("SELECT pg_current_xact_id()")
        yield connection


def test_reads_changes_page_by_page(feed: Service, reader: ChangeReader) -> None:
    """Each page continues after the cursor of the previous one."""
    user_ids = sign_up(feed, 5)
    cursor, found = None, list[str]()
    while page := reader.read(cursor, 2):
        found += [change.object_id for change in page]
        cursor = Cursor.parse(page[-1].cursor)
    assert found == user_ids
    assert reader.read(cursor) == []


def test_reads_nothing_before_the_end(feed: Service, reader: ChangeReader) -> None:
    sign_up(feed)
    end = reader.find_end()
    assert reader.read(end) == []
    [user_id] = sign_up(feed)
    assert [change.object_id for change in reader.read(end)] == [user_id]


def test_ends_at_a_change_that_survives_a_crash(feed: Service, reader: ChangeReader) -> None:
    """After a crash, PostgreSQL may reuse the ids of transactions that wrote nothing to disk."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no transaction ids")
    assert reader.find_end() == START
    sign_up(feed)
    feed.rows("SELECT pg_current_xact_id()")
    assert str(reader.find_end()) == reader.read(None)[-1].cursor


def test_withholds_changes_while_an_older_transaction_is_running(
    feed: Service, reader: ChangeReader
) -> None:
    """Otherwise, its changes would appear before those that were read."""
    assert reader.find_delay() == 0
    with other_transaction(feed) as other:
        sign_up(feed)
        assert reader.read(None) == []
        assert reader.find_delay() > 0
        other.commit()
    assert len(reader.read(None)) == 1
    assert reader.find_delay() == 0


def test_refuses_rows_of_another_cluster(feed: Service, reader: ChangeReader) -> None:
    """In a restored dump, transaction ids are higher than those of new transactions."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no transaction ids")
    sign_up(feed)
    with pytest.raises(ChangesRestored):
        reader.read(Cursor(2**40, 1))
    feed.rows("UPDATE user_changes SET transaction_id = 1099511627776")
    with pytest.raises(ChangesRestored, match="DELETE FROM user_changes"):
        reader.read(None)
    response = get(feed)
    assert (response.status_code, response.get_json()["reason"]) == (503, "changes_restored")
    feed.rows("DELETE FROM user_changes")
    assert reader.read(None) == []


def test_refuses_cursors_of_another_sqlite_file(feed: Service, reader: ChangeReader) -> None:
    """After the restoration of a backup, new rows have numbers that readers already know."""
    if not feed.database_url.startswith("sqlite"):
        pytest.skip("On PostgreSQL, transaction ids are compared")
    sign_up(feed, 2)
    [_, last] = reader.read(None)
    feed.rows("DELETE FROM user_changes WHERE sequence = 2")
    for cursor in (Cursor.parse(last.cursor), Cursor(812, 1)):
        with pytest.raises(ChangesRestored, match="another database"):
            reader.read(cursor)
    assert reader.read(reader.find_end()) == []


def test_keeps_the_changes_of_an_object_in_order(feed: Service, reader: ChangeReader) -> None:
    """A transaction that began first may change the object last."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    store, [user_id] = store_of(feed), sign_up(feed)
    with store.database.connect() as connection, store.statements.transaction(connection):
        connection.exec_driver_sql("SELECT pg_current_xact_id()")
        feed.deliver(user_event(user_id, at=NOW_MS + 10, first_name="Augusta"))
        store.statements.write(
            connection,
            store.statements.end,
            {"rows": json.dumps([{"id": user_id}]), "now": datetime.now(UTC)},
        )
    assert [change.kind for change in reader.read(None)] == ["created", "updated", "deleted"]


def test_tells_a_reader_of_pruned_changes(feed: Service, reader: ChangeReader) -> None:
    """A reader that has read all pruned changes, or is new, continues."""
    sign_up(feed, 5)
    cursors = [Cursor.parse(change.cursor) for change in reader.read(None)]
    soon = datetime.now(UTC) + timedelta(minutes=1)
    assert sum(reader.prune(soon, batch=2)) == 5
    assert sum(reader.prune(soon, batch=2)) == 0
    [user_id] = sign_up(feed)
    for cursor in (START, *cursors[:4]):
        with pytest.raises(ChangesPruned, match="were pruned"):
            reader.read(cursor)
    for after in (None, cursors[4]):
        assert [change.object_id for change in reader.read(after, 1)] == [user_id]
    response = get(feed, after=str(cursors[3]))
    assert (response.status_code, response.get_json()["reason"]) == (410, "changes_pruned")
    assert sum(reader.prune(soon, batch=2)) == 1
    assert feed.rows("SELECT kind, object_id FROM user_changes") == [("pruned", "")]


def test_prunes_only_old_changes(feed: Service, reader: ChangeReader) -> None:
    user_ids = sign_up(feed, 3)
    feed.rows(
        f"UPDATE user_changes SET changed_at = '2020-01-01' WHERE object_id <> '{user_ids[2]}'"
    )
    assert list(reader.prune(datetime.now(UTC) - timedelta(days=1))) == [2]
    assert [change.object_id for change in reader.read(None)] == user_ids[2:]


def test_prunes_only_the_beginning_of_the_feed(feed: Service, reader: ChangeReader) -> None:
    """
    Only the old changes before the first newer change are deleted.

    A transaction that began first may write last, so an old change may come after a newer one. If
    it became the marker, readers that start with the oldest change would find it again and again.
    """
    user_ids = sign_up(feed, 3)
    feed.rows(
        f"UPDATE user_changes SET changed_at = '2020-01-01' WHERE object_id <> '{user_ids[1]}'"
    )
    assert list(reader.prune(datetime.now(UTC) - timedelta(days=1))) == [1]
    assert list(reader.prune(datetime.now(UTC) - timedelta(days=1))) == []
    cursor, found = None, list[str]()
    while page := reader.read(cursor, 1):
        found += [change.object_id for change in page]
        cursor = Cursor.parse(page[-1].cursor)
    assert found == user_ids[1:]


# HTTP


def test_answers_with_changes(feed: Service) -> None:
    """The answer has camel-case names, and the cursor for the next request."""
    [user_id] = sign_up(feed)
    answer = get(feed).get_json()
    [change] = answer["changes"]
    assert change.pop("changedAt").endswith("Z")
    assert change.pop("cursor") == answer["next"]
    assert change == {
        "objectType": "user",
        "objectId": user_id,
        "kind": "created",
        "fields": ["email", "name", "image_url"],
        "version": NOW_MS,
    }
    assert get(feed, after=answer["next"]).get_json() == {"changes": [], "next": answer["next"]}
    end = get(feed, after="end").get_json()
    assert end["changes"] == []
    assert get(feed, after=end["next"]).get_json()["changes"] == []


def test_answers_an_empty_feed_without_a_cursor(feed: Service) -> None:
    assert get(feed).get_json() == {"changes": [], "next": None}


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"after": "1"}, "cursor_malformed"),
        ({"after": "1-2-3"}, "cursor_malformed"),
        ({"after": f"{10**19}-1"}, "cursor_malformed"),
        ({"limit": "0"}, "query_invalid"),
        ({"limit": "1001"}, "query_invalid"),
        ({"limit": "all"}, "query_invalid"),
        ({"wait": "11"}, "query_invalid"),
        ({"wait": "-1"}, "query_invalid"),
    ],
)
def test_refuses_malformed_requests(feed: Service, query: dict[str, str], reason: str) -> None:
    response = get(feed, **query)
    assert (response.status_code, response.get_json()["reason"]) == (400, reason)


@pytest.mark.parametrize("header", [None, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x"])
def test_refuses_other_tokens(feed: Service, header: str | None) -> None:
    response = feed.http.get("/changes", headers={"Authorization": header} if header else {})
    assert (response.status_code, response.get_json()["reason"]) == (401, "changes_token_invalid")


def test_has_no_route_without_a_token(make_service: MakeService) -> None:
    assert get(make_service(CLERK_TABLES="changes")).status_code == 404


def test_waits_for_a_change(feed: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits, it holds no database connection."""
    monkeypatch.setattr(route, "POLL", 0.01)
    pool: Any = store_of(feed).database.engine.pool
    with ThreadPool(1) as threads:
        answer = threads.submit(lambda: get(feed, after="0-0", wait=10))
        eventually(lambda: pool.checkedin() > 0)
        assert not answer.done()
        sign_up(feed)
        assert len(answer.result(20).get_json()["changes"]) == 1


def test_answers_at_the_end_of_the_wait(feed: Service) -> None:
    assert get(feed, wait=1).get_json()["changes"] == []


def test_ends_waits_before_a_worker_must_stop() -> None:
    """Otherwise, each restart of the service would drop waiting requests without a response."""
    configuration = (PROJECT / "gunicorn.conf.py").read_text()
    [graceful] = re.findall(r"^graceful_timeout = (\d+)", configuration, re.MULTILINE)
    assert int(graceful) > route.MAX_WAIT + route.POLL


def test_limits_the_number_of_waiting_requests(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered at once."""
    monkeypatch.setattr(route, "MAX_WAITING", 0)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waited"))
    feed = make_service(CLERK_TABLES="changes", CHANGES_TOKEN=TOKEN)
    assert get(feed, wait=10).get_json()["changes"] == []


# Operators


def test_reports_whether_readers_see_all_changes(
    feed: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor warns if another transaction holds the feed up."""
    store = store_of(feed)
    assert [finding.code for finding in judge_changes(store)] == ["changes_readable"]
    with other_transaction(feed):
        sign_up(feed)
        monkeypatch.setattr(change_feed, "MAX_DELAY", 0.0)
        [finding] = judge_changes(store)
        assert (finding.code, finding.level) == ("changes_delayed", Level.WARNING)
        assert "pg_stat_activity" in (finding.remedy or "")


def test_reports_rows_of_another_cluster(feed: Service) -> None:
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no transaction ids")
    sign_up(feed)
    feed.rows("UPDATE user_changes SET transaction_id = 1099511627776")
    findings = {finding.code: finding for finding in judge_database(store_of(feed), SETTINGS)}
    assert findings["changes_restored"].level is Level.ERROR
    assert "DELETE FROM user_changes" in (findings["changes_restored"].remedy or "")


def test_refuses_a_store_without_the_feed(service: Service) -> None:
    with pytest.raises(RuntimeError, match="CLERK_TABLES=changes"):
        ChangeReader(store_of(service))
    assert list(judge_changes(store_of(service))) == []


def test_needs_the_table_for_the_token(clerk: FakeClerk) -> None:
    with pytest.raises(SettingsError, match="CLERK_TABLES does not contain changes"):
        create_app({**clerk.environ, "CHANGES_TOKEN": TOKEN})


PATCHED_LATE = """
from clerkhooks.web import changes
import gevent.monkey; gevent.monkey.patch_all()
import gevent

order = []
waiting = gevent.spawn(lambda: changes._wait(lambda: order.append("read"), 0.5))
other = gevent.spawn(lambda: (gevent.sleep(0.01), order.append("other")))
gevent.joinall([waiting, other])
print(order)
"""


def test_lets_others_run_if_gevent_patches_late() -> None:
    """With preload_app and gunicorn's own gevent worker, modules are imported before patching."""
    command = [sys.executable, "-W", "ignore", "-c", PATCHED_LATE]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['other', 'read']\n", done.stderr
