"""The ``changes`` command, and ``prune`` with a change feed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import Result

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.cli.follow import Interruption, interrupts
from clerkhooks.settings import PROJECT
from clerkhooks.store.change_reader import ChangeReader
from clerkhooks.web.state import disconnect
from tests.conftest import SLOW_ON_POSTGRESQL, MakeService, migrate
from tests.replication import cluster
from tests.server import ended_by, environ
from tests.support import Service, user_event
from tests.syncing import store_of


@pytest.fixture
def feed(make_service: MakeService) -> Service:
    """Create the service with the change feed."""
    return make_service(CLERK_TABLES="changes")


def run(service: Service, *arguments: str) -> Result:
    """Run a command as ``flask clerk`` does."""
    return service.app.test_cli_runner().invoke(args=["clerk", *arguments])


def sign_up(service: Service) -> str:
    """Deliver an event for a new user; return the id."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    return user_id


@contextmanager
def following(service: Service, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``changes --follow`` as an operator does; end it with Ctrl-C, which must succeed."""
    variables = service.clerk.environ | {
        "DATABASE_URL": service.database_url,
        "CLERK_TABLES": "changes",
    }
    command = [sys.executable, "-u", "-m", "clerkhooks", "changes", "--follow", *arguments]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environ(**variables), stdout=subprocess.PIPE, text=True
    )
    with ended_by(signal.SIGINT, process):
        yield process


def test_lists_changes_as_a_table_and_as_json(feed: Service) -> None:
    assert run(feed, "changes").output == "No changes found.\n"
    assert run(feed, "changes", "--json").output == ""
    user_ids = [sign_up(feed), sign_up(feed)]
    heading, *lines = run(feed, "changes").output.splitlines()
    assert heading.split()[:3] == ["changed_at", "kind", "object_type"]
    assert [line.split()[4] for line in lines] == user_ids
    first, _ = map(json.loads, run(feed, "changes", "--json").output.splitlines())
    [second] = map(
        json.loads, run(feed, "changes", "--json", "--after", first["cursor"]).output.splitlines()
    )
    assert (first["object_id"], second["object_id"]) == tuple(user_ids)
    assert run(feed, "changes", "--json", "--after", "end").output == ""


def test_refuses_to_list_changes_without_the_feed(service: Service) -> None:
    result = run(service, "changes")
    assert (result.exit_code, "Set CLERK_TABLES=changes." in result.output) == (2, True)


def test_refuses_a_malformed_cursor(feed: Service) -> None:
    result = run(feed, "changes", "--after", "17")
    assert (result.exit_code, "malformed" in result.output) == (2, True)


@pytest.mark.parametrize("database_url", SLOW_ON_POSTGRESQL, indirect=True)
def test_follows_the_feed(feed: Service) -> None:
    """Each line appears while the command is running, as text or as JSON."""
    first = sign_up(feed)
    arguments = () if feed.database_url.startswith("sqlite") else ("--json",)
    with following(feed, *arguments) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        if not arguments:
            next(lines)  # the heading
        assert first in next(lines)
        for _ in range(2):
            user_id = sign_up(feed)
            assert user_id in next(lines)


def test_notes_a_signal_whose_exception_is_ignored() -> None:
    """Then a loop ends at its next check. Afterwards, the earlier signal handlers are back."""
    interruption, before = Interruption(), signal.getsignal(signal.SIGTERM)
    with interrupts(interruption.note):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.has_arrived
    assert signal.getsignal(signal.SIGTERM) == before


def test_follows_the_feed_after_the_loss_of_its_connections(feed: Service) -> None:
    """As after a restart of PostgreSQL. No change is lost or repeated."""
    if feed.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no connections to lose")
    with following(feed, "--json") as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        for _ in range(2):
            user_id = sign_up(feed)
            assert user_id in next(lines)
            feed.rows(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.mark.slow
def test_follows_the_feed_on_a_standby(clerk: FakeClerk) -> None:
    """A standby has no notifications, and refuses LISTEN."""
    with cluster() as nodes:
        migrate(nodes.url, clerk)
        standby_url = f"postgresql://postgres@/{nodes.name}?host={nodes.standby.home}"
        variables = clerk.environ | {"CLERK_TABLES": "changes"}
        primary, standby = (
            Service(create_app(variables | {"DATABASE_URL": url}), clerk, url)
            for url in (nodes.url, standby_url)
        )
        with following(standby, "--json") as process:
            assert process.stdout is not None
            lines = iter(process.stdout)
            for _ in range(3):
                user_id = sign_up(primary)
                assert user_id in next(lines)
        for service in (primary, standby):
            disconnect(service.app)


def test_prunes_old_changes_with_old_messages(feed: Service) -> None:
    sign_up(feed)
    cursor = json.loads(run(feed, "changes", "--json").output)["cursor"]
    sign_up(feed)
    month_ago = datetime.now(UTC) - timedelta(days=31)
    feed.rows(f"UPDATE user_changes SET changed_at = '{month_ago:%Y-%m-%d %H:%M:%S}'")
    result = run(feed, "prune", "--json")
    assert json.loads(result.output) == {"pruned": 0, "pruned_changes": 2}
    assert run(feed, "prune").output == "0 messages deleted.\n0 changes deleted.\n"
    assert ChangeReader(store_of(feed)).read(None) == []
    result = run(feed, "changes", "--after", cursor)
    assert (result.exit_code, "were pruned" in result.output) == (2, True)
