"""The ``log``, ``send`` and ``prune`` commands."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from clerkhooks import create_app
from clerkhooks.clerk.fake import clerk_id, event_body
from clerkhooks.cli.main import main
from clerkhooks.store import messages
from clerkhooks.web.state import State, disconnect
from tests.server import Server
from tests.support import NOW_MS, Service, broken_users, user_event


def run(service: Service, *arguments: str) -> Result:
    """Run a command as ``flask clerk`` does."""
    return service.app.test_cli_runner().invoke(args=["clerk", *arguments])


def age(service: Service, message_id: str, **days: float) -> None:
    """Set each named time of a message to the given number of days ago."""
    state: State = service.app.extensions["clerkhooks"]
    values = {name: datetime.now(UTC) - timedelta(days=number) for name, number in days.items()}
    table = state.store.messages
    changed = sa.update(table).where(table.c.message_id == message_id).values(values)
    state.store.database.write(changed.returning(table.c.message_id))


def test_deletes_old_messages_and_no_users(service: Service) -> None:
    """
    Messages that were received and processed before the cutoff are deleted.

    Users are kept, and so is an old message that was retried recently. If a deleted message is
    delivered again, it is stale.
    """
    user_id = clerk_id("user")
    bodies = {
        name: user_event(user_id, at=at)
        for at, name in enumerate(("msg_old", "msg_retried", "msg_new"), 1)
    }
    for message_id, body in bodies.items():
        service.outcome(body, message_id)
    age(service, "msg_old", received_at=31, processed_at=31)
    age(service, "msg_retried", received_at=31, processed_at=29)
    result = run(service, "prune", "--older-than", "30d", "--json")
    assert (result.exit_code, json.loads(result.output)) == (0, {"pruned": 1})
    assert service.rows("SELECT message_id FROM webhook_messages ORDER BY 1") == [
        ("msg_new",),
        ("msg_retried",),
    ]
    assert service.outcome(bodies["msg_old"], "msg_old") == "stale"
    assert run(service, "prune").output == "0 messages deleted.\n"


@pytest.mark.parametrize("count", [5, 6, 7])
def test_deletes_in_batches(service: Service, count: int) -> None:
    """Every old message is deleted, whether or not the last batch is full."""
    for _ in range(count):
        service.outcome(user_event(clerk_id("user")))
    state: State = service.app.extensions["clerkhooks"]
    batches = list(messages.prune(state.store, datetime.now(UTC) + timedelta(days=1), batch=3))
    assert (sum(batches), max(batches)) == (count, 3)
    assert service.rows("SELECT count(*) FROM webhook_messages") == [(0,)]


def test_continues_within_the_same_time(service: Service) -> None:
    """A batch may end between two messages that were received at the same time."""
    for number in range(5):
        service.outcome(user_event(clerk_id("user")), f"msg_{number}")
    at = "(SELECT min(received_at) FROM webhook_messages)"
    service.rows(f"UPDATE webhook_messages SET received_at = {at}")
    state: State = service.app.extensions["clerkhooks"]
    before = datetime.now(UTC) + timedelta(days=1)
    assert list(messages.prune(state.store, before, batch=2)) == [2, 2, 1]


def test_pauses_after_each_batch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch, pruning pauses for as long as the batch took."""
    pauses: list[float] = []
    monkeypatch.setattr("clerkhooks.store.messages.sleep", pauses.append)
    for _ in range(3):
        service.outcome(user_event(clerk_id("user")))
    state: State = service.app.extensions["clerkhooks"]
    began = time.monotonic()
    batches = list(messages.prune(state.store, datetime.now(UTC) + timedelta(days=1), batch=2))
    assert (len(batches), len(pauses)) == (2, 2)
    assert 0 < sum(pauses) <= time.monotonic() - began


@pytest.mark.parametrize("older_than", ["6d", "167h", "0w"])
def test_needs_force_to_delete_recent_messages(service: Service, older_than: str) -> None:
    """Recent messages are deleted only with ``--force``, because Svix may still retry them."""
    result = run(service, "prune", "--older-than", older_than)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert run(service, "prune", "--older-than", older_than, "--force").exit_code == 0


@pytest.mark.parametrize("older_than", ["30", "d", "-1d", "1y", "99999w", ""])
def test_refuses_a_malformed_age(service: Service, older_than: str) -> None:
    """The exit status is 2, and the message gives examples."""
    result = run(service, "prune", "--older-than", older_than)
    assert result.exit_code == 2
    assert "12h, 30d or 8w" in result.output


@pytest.mark.parametrize("since", ["0001-01-01T00:00+01:00", "9999-12-31T23:59-01:00"])
def test_refuses_a_time_that_is_out_of_range(service: Service, since: str) -> None:
    """A time that would be before year 1 or after year 9999 in UTC is refused."""
    result = run(service, "log", "--since", since)
    assert (result.exit_code, "is out of range" in result.output) == (2, True), result.output


def test_explains_itself(service: Service) -> None:
    """Each command has ``--help``, which needs no configuration."""
    for name in ("sync", "users", "user", "log", "send", "prune"):
        for result in (run(service, name, "--help"), CliRunner().invoke(main, [name, "--help"])):
            assert (result.exit_code, result.output.startswith("Usage:")) == (0, True)
    for result in (run(service, "--help"), CliRunner().invoke(main, ["-h"])):
        assert (result.exit_code, "  prune " in result.output) == (0, True)


def test_reports_a_database_failure(unreachable: Service) -> None:
    """The exit status is 2. Neither a traceback nor the database's error text is printed."""
    for command in ("prune", "log"):
        result = run(unreachable, command)
        assert result.exit_code == 2
        assert "OperationalError" in result.output
        assert "webhook_messages" not in result.output


@pytest.fixture
def delivered(service: Service) -> dict[str, str]:
    """Deliver one message for each outcome, and return the user's id."""
    user_id = clerk_id("user")
    with broken_users(service):
        service.deliver(user_event(clerk_id("user"), "user.created"), "msg_failed")
    service.outcome(user_event(user_id), "msg_applied")
    service.outcome(user_event(user_id, at=1), "msg_stale")
    service.outcome(event_body("role.created", {}, 1), "msg_ignored")
    return {"user": user_id}


def logged(service: Service, *arguments: str) -> list[str]:
    """Return the ids that the log lists as JSON; the table must list the same ids."""
    found = [
        json.loads(line) for line in run(service, "log", *arguments, "--json").stdout.splitlines()
    ]
    table = run(service, "log", *arguments).stdout
    assert [word for word in table.split() if word.startswith("msg_")] == [
        message["message_id"] for message in found
    ]
    return [str(message["message_id"]) for message in found]


def test_lists_the_latest_messages(service: Service, delivered: dict[str, str]) -> None:
    """The newest message is last. Options filter by failure, user, type and time."""
    assert logged(service) == ["msg_failed", "msg_applied", "msg_stale", "msg_ignored"]
    assert logged(service, "--limit", "2") == ["msg_stale", "msg_ignored"]
    assert logged(service, "--failed") == ["msg_failed"]
    assert logged(service, "--user", delivered["user"]) == ["msg_applied", "msg_stale"]
    assert logged(service, "--type", "role.created") == ["msg_ignored"]
    age(service, "msg_applied", received_at=2)
    assert logged(service, "--since", "1d") == ["msg_failed", "msg_stale", "msg_ignored"]
    assert logged(service, "--since", "2020-01-31")[0] == "msg_applied"
    assert (
        logged(
            service, "--since", f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%S+00:00}"
        )
        == []
    )
    assert run(service, "log", "--type", "no.such").stdout == "No messages found.\n"
    assert run(service, "log", "--since", "soon").exit_code == 2


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_follows_the_log(
    service: Service, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """
    Each new message is printed once. A failed message is printed again after its retry.

    Ctrl-C ends the command with status 0.
    """
    user_id = clerk_id("user")
    body = user_event(user_id)
    with broken_users(service):
        service.deliver(body, "msg_0")

    polls = iter(range(3))

    def deliver_next(_seconds: float) -> None:
        poll = next(polls, None)
        if poll is None:
            raise KeyboardInterrupt
        following = user_event(user_id, at=NOW_MS + poll) if poll else body
        service.deliver(following, f"msg_{poll}")

    monkeypatch.setattr("clerkhooks.cli.messages.time.sleep", deliver_next)
    result = run(service, "log", "--follow", *arguments)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if "msg_" in line]
    assert [re.findall("msg_.", line)[0] for line in lines] == ["msg_0", "msg_0", "msg_1", "msg_2"]
    assert [bool(re.search("failed", line)) for line in lines] == [True, False, False, False]


on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")


def sent(server: Server, *arguments: str) -> tuple[int, Any]:
    """Send an event to *server*; return the exit status and the printed JSON."""
    app = create_app(
        server.clerk.environ | {"DATABASE_URL": server.database_url, "PORT": str(server.port)}
    )
    result = app.test_cli_runner().invoke(args=["clerk", "send", *arguments, "--json"])
    disconnect(app)
    return result.exit_code, json.loads(result.stdout)


@on_sqlite
def test_sends_signed_events(server: Server) -> None:
    """
    Sign-ups, updates and deletions are applied. A repeated message returns ``duplicate``.

    If a message has been tampered with or is too old, it is refused, and the exit status is 1.
    """
    user_id = clerk_id("user")
    status, printed = sent(
        server,
        "user.created",
        "--user",
        user_id,
        "--email",
        "grace@example.org",
        "--first-name",
        "Grace",
        "--repeat",
        "2",
    )
    assert (status, [json.loads(answer["body"])["outcome"] for answer in printed["answers"]]) == (
        0,
        ["applied", "duplicate"],
    )
    assert server.rows(f"SELECT email, name FROM users WHERE id = '{user_id}'") == [
        ("grace@example.org", "Grace Lovelace")
    ]
    changes = (
        "--set",
        "data.last_name=Hopper",
        "--set",
        "data.public_metadata.plan={}",
        "--set",
        f"data.updated_at={NOW_MS + 10**6}",
    )
    assert sent(server, "user.updated", "--user", user_id, *changes)[0] == 0
    assert server.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Ada Hopper",)]
    for refused, reason in (
        (("--tamper",), "signature_mismatch"),
        (("--age", "10m"), "timestamp_out_of_tolerance"),
    ):
        status, printed = sent(server, "user.updated", "--user", user_id, *refused)
        assert (status, json.loads(printed["answers"][0]["body"])["reason"]) == (1, reason)
    assert sent(server, "user.deleted", "--user", user_id)[0] == 0
    assert server.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Deleted User",)]


@pytest.mark.parametrize(
    ("event_type", "kind"),
    [
        ("session.created", "session"),
        ("organization.created", "organization"),
        ("organizationMembership.created", "organization_membership"),
        ("sms.created", "sms"),
        ("x", "x"),
        ("x.deleted", "x"),
    ],
)
@on_sqlite
def test_sends_any_type(server: Server, event_type: str, kind: str) -> None:
    """For any event type, the data is an object of the matching kind."""
    status, printed = sent(server, event_type)
    event = json.loads(printed["request"]["body"])
    assert (status, event["type"], event["data"]["object"]) == (0, event_type, kind)


@on_sqlite
def test_sends_events_of_an_organization(server: Server) -> None:
    """The option sets the organization of a membership."""
    organization_id = clerk_id("org")
    arguments = ("organizationMembership.created", "--organization", organization_id)
    status, printed = sent(server, *arguments)
    event = json.loads(printed["request"]["body"])
    assert (status, event["data"]["organization"]["id"]) == (0, organization_id)


@on_sqlite
def test_sends_a_file(server: Server, tmp_path: Path) -> None:
    """A file may contain a whole event or only its data."""
    user_id = clerk_id("user")
    for number, content in enumerate(
        ({"id": user_id}, {"data": {"id": user_id, "first_name": "Grace"}, "type": "user.updated"})
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        assert sent(server, "user.created", "--file", str(tmp_path / f"{number}.json"))[0] == 0
    assert server.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Grace",)]


@on_sqlite
def test_prints_the_request_without_the_secret(server: Server) -> None:
    """The request and the response are printed as text."""
    app = create_app(
        server.clerk.environ | {"DATABASE_URL": server.database_url, "PORT": str(server.port)}
    )
    result = app.test_cli_runner().invoke(args=["clerk", "send", "user.created"])
    disconnect(app)
    assert f"POST http://127.0.0.1:{server.port}/webhooks/clerk" in result.stdout
    assert "svix-signature: v1," in result.stdout
    assert '"first_name": "Ada"' in result.stdout
    assert '200 {"outcome": "applied"' in result.stdout
    assert server.clerk.environ["CLERK_WEBHOOK_SECRET"] not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "http://example.com/webhooks/clerk"], "Use https://"),
        (["--to", "nowhere"], "not a URL"),
        (["--to", "http://127.0.0.1:1/webhooks/clerk"], "does not respond (ConnectError)"),
        (["--to", "http://127.0.0.1:1"], "Start the server first: gunicorn wsgi:app"),
        (["--user", "ada"], "not a Clerk user id"),
        (["--organization", "acme"], "not a Clerk organization id"),
        (["--set", "data"], "path=value"),
        (["--set", "data.id.x=1"], "'id' is not an object"),
        (["--file", "setup.cfg"], "is not a JSON object"),
        (["--to", "https://xn--.com"], "does not respond (IDNAError)"),
        (["--to", "http://127.0.0.1:1", "--set", "x=" + "[" * 5000], "does not respond"),
    ],
)
def test_refuses_to_send_with_invalid_options(
    service: Service, arguments: list[str], message: str
) -> None:
    """The exit status is 2, and the message names the problem."""
    result = run(service, "send", "user.created", *arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_refuses_to_send_a_file_that_is_nested_too_deeply(service: Service, tmp_path: Path) -> None:
    """For such a file, Python's parser raises RecursionError, which is not a ValueError."""
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    result = run(service, "send", "user.created", "--file", str(file))
    assert (result.exit_code, "is not a JSON object" in result.output) == (2, True), result.output
