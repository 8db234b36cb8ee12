"""The ``clerkhooks sync`` command, run by an operator or a scheduler."""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from click.testing import Result

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.settings import PROJECT
from clerkhooks.sync import connections
from clerkhooks.sync.follower import Follower
from tests.backend import Backend, answering, refusing, stalling
from tests.conftest import SLOW_ON_POSTGRESQL, MakeService
from tests.server import environ
from tests.support import NOW_MS, Service

LONG_AGO = NOW_MS - 3_600_000


def run(service: Service, *arguments: str) -> Result:
    """Run the command as ``flask --app wsgi clerk sync`` does."""
    return service.app.test_cli_runner().invoke(args=["clerk", "sync", *arguments])


def objects(result: Result) -> list[Any]:
    """Return the objects that were printed with ``--json``."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_prints_a_summary(syncing: Service, backend: Backend) -> None:
    """
    The text output has a line for each result; the JSON output is one object.

    Progress is printed to stderr.
    """
    for number in range(3):
        backend.sign_up(at=LONG_AGO + number)
    first = run(syncing)
    assert first.exit_code == 0
    lines = first.stdout.splitlines()
    assert lines[0].startswith("Synced 3 users in ")
    assert lines[1].split() == ["created", "3"]
    assert first.stderr.splitlines() == ["users at Clerk", "users only here"]
    second = run(syncing, "--json")
    zeros = dict.fromkeys(
        ("created", "updated", "newer_here", "tombstoned", "unknown", "failed", "withheld"), 0
    )
    assert objects(second) == [{"summary": zeros | {"unchanged": 3, "ok": True}}]


def test_checks_without_changing_anything(syncing: Service, backend: Backend) -> None:
    """
    The exit status is 1 if anything differs.

    The text output shows users and fields; the JSON output adds the values.
    """
    ids = [backend.sign_up(at=LONG_AGO + number) for number in range(2)]
    syncing.clerk_service.deliver("user.created", backend.users[ids[0]])
    backend.update(ids[0], first_name="Grace", updated_at=LONG_AGO + 10)
    text = run(syncing, "--check")
    assert text.exit_code == 1
    assert f"{ids[0]} differs: name" in text.stdout
    assert f"{ids[1]} is missing from the database" in text.stdout
    assert "Users that differ from Clerk: 2" in text.stdout
    assert "Grace" not in text.output, "a scheduler may log the output"
    as_json = run(syncing, "--check", "--json")
    *findings, summary = objects(as_json)
    differs, missing = sorted(findings, key=lambda finding: str(finding["kind"]))
    assert differs == {
        "kind": "differs",
        "object": "user",
        "id": ids[0],
        "reason": None,
        "fields": {"name": {"here": "Ada Lovelace", "clerk": "Grace Lovelace"}},
    }
    assert (missing["kind"], missing["id"], summary["summary"]["drift"], as_json.exit_code) == (
        "missing_here",
        ids[1],
        2,
        1,
    )
    assert run(syncing).exit_code == 0
    again = run(syncing, "--check")
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (
        0,
        "Users that differ from Clerk: 0",
    )


def test_syncs_only_the_named_users(syncing: Service, backend: Backend) -> None:
    """
    Other users are not read.

    The exit status is 1 if a named user exists neither in the table nor at Clerk.
    """
    named, other = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    result = run(syncing, named)
    assert (result.exit_code, syncing.user(named, ("name",)), syncing.user(other)) == (
        0,
        ("Ada Lovelace",),
        None,
    )
    unknown = run(syncing, named, clerk_id("user"), "--json")
    assert (unknown.exit_code, objects(unknown)[-1]["summary"]["unknown"]) == (1, 1)


@pytest.mark.parametrize("which", ["--missing", "--failed"])
def test_syncs_only_selected_users(syncing: Service, backend: Backend, which: str) -> None:
    """Options select users without a profile, or users whose messages failed."""
    user_id = backend.sign_up(at=LONG_AGO)
    syncing.call(user_id)
    result = run(syncing, which, "--json")
    assert (result.exit_code, objects(result)[-1]["summary"]["updated"]) == (
        0,
        1 if which == "--missing" else 0,
    )


def test_withholds_deletions_and_says_how_to_force_them(syncing: Service, backend: Backend) -> None:
    """If Clerk has no users, nobody is deleted, because the key is probably wrong."""
    user_id = backend.sign_up(at=LONG_AGO)
    assert run(syncing).exit_code == 0
    syncing.rows("UPDATE users SET created_at = '2020-01-01 00:00:00.000000'")
    backend.delete(user_id)
    result = run(syncing)
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert run(syncing, "--force").exit_code == 0
    assert syncing.user(user_id, ("name",)) == ("Deleted User",)


def test_reports_a_user_that_cannot_be_read(syncing: Service, backend: Backend) -> None:
    """
    The message includes the user's id, if any.

    The exit status is 1, and the other users are synced.
    """
    backend.sign_up(at=LONG_AGO)
    odd = backend.sign_up(at=LONG_AGO, updated_at=None)
    backend.users["odd"] = None
    result = run(syncing)
    assert result.exit_code == 1
    assert f"{odd} could not be read: updated_at_missing" in result.stdout
    assert "A user without an id could not be read: user_id_malformed" in result.stdout
    assert syncing.rows("SELECT count(*) FROM users") == [(1,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user_1", "--missing"], "Use only one of"),
        (["--missing", "--failed"], "Use only one of"),
        (["role_1"], "not a Clerk id"),
        (["user_1", "org_1"], "org_1 is not kept without CLERK_TABLES=organizations"),
        (["--follow", "--check"], "Use --follow without"),
    ],
)
def test_refuses_wrong_use(service: Service, arguments: list[str], message: str) -> None:
    """The exit status is 2, and the message names the mistake."""
    result = run(service, *arguments)
    assert (result.exit_code, message in result.output) == (2, True)


@pytest.mark.parametrize("arguments", [[], ["--follow"]])
def test_asks_for_the_key(service: Service, arguments: list[str]) -> None:
    """Without CLERK_SECRET_KEY, the message says where to find the key."""
    result = run(service, *arguments)
    assert result.exit_code == 2
    assert "CLERK_SECRET_KEY is not set" in result.output
    assert "Clerk Dashboard" in result.output


def test_prints_what_the_follower_does(syncing: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is a line with the time and the fields. ``stop`` is called after Ctrl-C."""

    def follow(follower: Follower, _context: object) -> None:
        follower.tell("lease_taken", {"lease": "follower", "holder": "host:1"})
        raise KeyboardInterrupt

    monkeypatch.setattr(Follower, "run", follow)
    result = run(syncing, "--follow")
    assert result.exit_code == 0
    assert re.fullmatch(r"[-:0-9 ]+  lease_taken  lease=follower  holder=host:1\n", result.output)


@pytest.mark.parametrize("status", [401, 403])
def test_explains_that_the_key_is_refused(syncing: Service, backend: Backend, status: int) -> None:
    """The exit status is 2, and the message does not contain the key."""
    backend.behaviours.append(refusing(status, "clerk_key_invalid"))
    result = run(syncing)
    assert result.exit_code == 2
    assert "Clerk Dashboard → API keys → Secret keys" in result.output
    assert "run the command again" in result.output
    assert backend.environ["CLERK_SECRET_KEY"] not in result.output


def test_refuses_to_run_twice_at_once(syncing: Service) -> None:
    """If runs overlap, the second exits with status 2 and leaves no ``gc.freeze()`` in effect."""
    frozen = gc.get_freeze_count()
    with connections.sole_writer(syncing.app.extensions["clerkhooks"].store):
        result = run(syncing)
    assert result.exit_code == 2
    assert "Another sync is running" in result.output
    assert gc.get_freeze_count() == frozen


def test_reports_a_database_failure(make_service: MakeService, backend: Backend) -> None:
    """The exit status is 2. Neither a traceback nor the database's error text is printed."""
    service = make_service(**backend.environ)
    service.rows("ALTER TABLE users RENAME TO elsewhere")
    try:
        backend.sign_up(at=LONG_AGO)
        result = run(service)
    finally:
        service.rows("ALTER TABLE elsewhere RENAME TO users")
    assert result.exit_code == 2
    assert "Database error (" in result.output
    assert "SELECT" not in result.output


def test_says_once_that_it_retries(syncing: Service, backend: Backend) -> None:
    """Otherwise, a sync without a network seems to hang for two minutes."""
    backend.behaviours += [answering(503), answering(503)]
    result = run(syncing, "--check")
    assert result.exit_code == 0
    what = "Clerk's Backend API answered 503. Retrying for up to 2 minutes.\n"
    assert result.stderr.count(what) == 1
    assert "answered" not in result.stdout


@pytest.mark.parametrize("database_url", SLOW_ON_POSTGRESQL, indirect=True)
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "clerkhooks", "sync"],
        pytest.param(["-m", "flask", "--app", "wsgi", "clerk", "sync"], marks=pytest.mark.slow),
    ],
    ids=["clerkhooks", "flask"],
)
def test_can_be_interrupted_and_run_again(
    syncing: Service, backend: Backend, command: list[str]
) -> None:
    """Ctrl-C ends a sync at once, even if Clerk does not respond. The next sync completes."""
    for number in range(3):
        backend.sign_up(at=LONG_AGO + number)
    count = iter(range(100))

    def stall(_path: str, _query: object) -> None:
        if next(count) == 3:
            backend.behaviours.append(stalling)

    backend.before = stall
    variables = environ(
        **syncing.clerk.environ | backend.environ | {"DATABASE_URL": syncing.database_url}
    )
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=PROJECT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    try:
        backend.wait_for(4)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert process.returncode == 2
    assert "Interrupted. Changes made so far are kept." in shown
    assert "users at Clerk  [" in shown, "there is no progress bar"
    assert "Stopped after " in stdout
    backend.before = lambda _path, _query: None
    assert run(syncing).exit_code == 0
    assert syncing.rows("SELECT count(*) FROM users WHERE name = 'Ada Lovelace'") == [(3,)]
