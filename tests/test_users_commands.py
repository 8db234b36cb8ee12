"""``users`` and ``user``, as ``clerkhooks …`` and as ``flask clerk …``."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from click.testing import Result

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.cli.options import print_table
from clerkhooks.settings import PROJECT
from clerkhooks.web.state import disconnect
from tests.server import environ
from tests.support import NOW_MS, Service, deletion, rows, user_event

RunProcess = Callable[..., CompletedProcess[str]]


def run(service: Service, *arguments: str) -> Result:
    """Run a command as ``flask clerk`` does."""
    return service.app.test_cli_runner().invoke(args=["clerk", *arguments])


def listed(service: Service, *arguments: str) -> list[str]:
    """Return the ids that are listed as JSON; the table must list the same ids."""
    users = json.loads(run(service, "users", *arguments, "--json").stdout)["users"]
    table = run(service, "users", *arguments).stdout
    if users:
        shown = [line.split()[0] for line in table.splitlines()[1:] if line]
        assert shown == [user["id"] for user in users]
    else:
        assert table == "No users found.\n"
    return [user["id"] for user in users]


@pytest.fixture
def people(service: Service) -> dict[str, str]:
    """Create one user of each kind, oldest first."""
    ids = {name: clerk_id("user") for name in ("ada", "grace", "unfilled", "deleted")}
    service.outcome(user_event(ids["ada"]))
    service.outcome(
        user_event(ids["grace"], first_name="grace", last_name="Hopper%", email_addresses=[])
    )
    service.call(ids["unfilled"])
    service.outcome(deletion(ids["deleted"]))
    return ids


def test_lists_the_newest_first(service: Service, people: dict[str, str]) -> None:
    """The command lists all users, only deleted users, or only users without a profile."""
    assert listed(service) == list(people.values())[::-1]
    assert listed(service, "--deleted") == [people["deleted"]]
    assert listed(service, "--unsynced") == [people["unfilled"]]
    assert run(service, "users", "--deleted", "--unsynced").exit_code == 2


def test_finds_by_id_email_and_beginning_of_the_name(
    service: Service, people: dict[str, str]
) -> None:
    """The search covers last names and ignores case. A percent sign is not a wildcard."""
    assert listed(service, people["ada"]) == [people["ada"]]
    assert listed(service, "ADA@example.org") == [people["ada"]]
    assert listed(service, "Grace h") == listed(service, "hopper") == [people["grace"]]
    for nobody in ("%", "opper", "race", "ada@example.com", "user_", clerk_id("user")):
        assert listed(service, nobody) == []
    assert listed(service, "grace hopper%") == [people["grace"]]


def test_reports_characters_that_cannot_be_stored(service: Service) -> None:
    """Python decodes invalid UTF-8 in an argument as lone surrogates, which cannot be stored."""
    ended = run(service, "users", "\udcff")
    assert ended.exit_code == 2
    assert "Some characters cannot be represented in the database's encoding" in ended.output


def test_continues_after_a_page(service: Service, people: dict[str, str]) -> None:
    """Each user appears on exactly one page. The text output ends with the next cursor."""
    read: list[str] = []
    arguments: list[str] = []
    for _ in people:
        page: dict[str, Any] = json.loads(
            run(service, "users", "--limit", "3", *arguments, "--json").stdout
        )
        read += [user["id"] for user in page["users"]]
        if page["next"] is None:
            break
        assert f"--after {page['next']}" in run(service, "users", "--limit", "3", *arguments).stderr
        arguments = ["--after", page["next"]]
    else:
        raise AssertionError("the pages do not end")
    assert read == list(people.values())[::-1]
    assert run(service, "users", "--after", "yesterday").exit_code == 2


def test_shows_a_user_and_the_source_of_the_row(service: Service, people: dict[str, str]) -> None:
    """The row is shown with its source, its version and the latest messages."""
    service.outcome(user_event(people["ada"], at=NOW_MS - 1), "msg_late")
    shown = run(service, "user", people["ada"])
    assert shown.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines()[:10])
    assert (lines["id"], lines["email"], lines["name"], lines["deleted_at"]) == (
        people["ada"],
        "ada@example.org",
        "Ada Lovelace",
        "-",
    )
    assert lines["source"].startswith("webhook, as of 20")
    assert "msg_late" in shown.stdout
    whole = json.loads(run(service, "user", people["ada"], "--json").stdout)
    assert (whole["user"]["source"], whole["user"]["version_updated_at"]) == ("webhook", NOW_MS)
    assert [message["outcome"] for message in whole["messages"]] == ["stale", "applied"]


def test_names_the_source_of_each_row(service: Service, people: dict[str, str]) -> None:
    """Webhooks, first calls and deletions are shown as sources."""
    sources = {
        name: json.loads(run(service, "user", user_id, "--json").stdout)["user"]["source"]
        for name, user_id in people.items()
    }
    assert sources == {
        "ada": "webhook",
        "grace": "webhook",
        "unfilled": "first call",
        "deleted": "user.deleted",
    }
    assert "source      first call\n" in run(service, "user", people["unfilled"]).stdout


def test_reports_an_unknown_user(service: Service) -> None:
    """The exit status is 1, and the text says how to fetch the user from Clerk."""
    user_id = clerk_id("user")
    text, as_json = run(service, "user", user_id), run(service, "user", user_id, "--json")
    assert (text.exit_code, as_json.exit_code) == (1, 1)
    assert f"clerkhooks sync {user_id}" in text.stdout
    assert json.loads(as_json.stdout) == {"user": None, "messages": []}


def test_shows_hostile_names_as_text(service: Service) -> None:
    """No control character, escape or bidirectional override reaches the terminal."""
    user_id = clerk_id("user")
    service.outcome(
        user_event(user_id, first_name="\x1b[31mred\r\n", last_name="\u202egnp.exe\u2028")
    )
    for output in (run(service, "users").stdout, run(service, "user", user_id).stdout):
        assert "red" in output
        assert not set(output.replace("\n", "")) & set("\x1b\r\u202e\u2028")


@pytest.mark.parametrize(
    ("is_terminal", "printed"),
    [(True, "id  name\n1   Ada Lo…\n"), (False, "id  name\n1   Ada Lovelace\n")],
)
def test_cuts_lines_to_the_width_of_the_terminal(
    is_terminal: bool, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines printed to a pipe or a file are not cut."""
    monkeypatch.setenv("COLUMNS", "11")
    with redirect_stdout(io.StringIO()) as output:
        monkeypatch.setattr(output, "isatty", lambda: is_terminal)
        print_table(("id", "name"), [(1, "Ada Lovelace")])
    assert re.sub(r"\x1b\[\d+m", "", output.getvalue()) == printed


def test_reports_a_database_failure(unreachable: Service) -> None:
    """The exit status is 2. Neither a traceback nor the database's error text is printed."""
    for arguments in (["users"], ["user", clerk_id("user")]):
        result = run(unreachable, *arguments)
        assert result.exit_code == 2
        assert "Database error (OperationalError" in result.output
        assert result.output.endswith("Run: flask --app wsgi db upgrade\n")
        assert "SELECT" not in result.output


APPLICATION = """
import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from clerkhooks import ClerkHooks, ClerkUser


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class User(ClerkUser, db.Model):
    __tablename__ = "members"


hooks = ClerkHooks(db, User)


def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///" + os.environ["FILE"]
    db.init_app(app)
    hooks.init_app(app, routes=("webhooks",))
    with app.app_context():
        db.create_all()
    return app
"""


@pytest.fixture
def flask_clerk(clerk: FakeClerk, tmp_path: Path) -> RunProcess:
    """Run ``flask clerk …`` in a small application, in a separate process."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    variables = environ(**clerk.environ, FILE=str(tmp_path / "shop.db"))

    def run_process(*arguments: str, **changes: str) -> CompletedProcess[str]:
        command = [sys.executable, "-m", "flask", "--app", "shop", "clerk", *arguments]
        own = variables | changes
        return subprocess.run(
            command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=60
        )

    return run_process


def test_works_in_an_application(
    flask_clerk: RunProcess, clerk: FakeClerk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands use the application's model, and suggest the application's commands."""
    for name, value in (clerk.environ | {"FILE": str(tmp_path / "shop.db")}).items():
        monkeypatch.setenv(name, value)
    app = runpy.run_path(str(tmp_path / "shop.py"))["create_app"]()

    def run_here(*arguments: str) -> Result:
        result: Result = app.test_cli_runner().invoke(args=["clerk", *arguments])
        return result

    user_id = clerk_id("user")
    unknown = run_here("user", user_id)
    assert (unknown.exit_code, unknown.stderr) == (1, "")
    assert f"To fetch the user from Clerk: flask clerk sync {user_id}" in unknown.stdout
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    columns = "id, name, is_online, last_seen, created_at, updated_at"
    now = "'2026-01-31 08:00:00'"
    rows(
        url, f"INSERT INTO members ({columns}) VALUES ('{user_id}', 'Ada', 0, {now}, {now}, {now})"
    )
    listed = flask_clerk("users", "--json")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [user["id"] for user in json.loads(listed.stdout)["users"]] == [user_id]
    shown = run_here("user", user_id)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "source      first call\n" in shown.stdout
    assert run_here("log").stdout == "No messages found.\n"
    assert run_here("prune", "--json").stdout == '{"pruned": 0}\n'
    unanswered = run_here("send", "user.created").stderr
    assert "5000/webhooks/clerk does not respond (ConnectError)" in unanswered
    assert unanswered.endswith("Start the server first: flask run\n")
    rows(url, "DROP TABLE members")
    assert run_here("users").stderr.endswith("Run: flask db upgrade\n")
    disconnect(app)


@pytest.mark.slow
def test_has_the_commands_that_an_application_needs(flask_clerk: RunProcess) -> None:
    """The service's own commands, such as ``dev``, are left out."""
    shown = flask_clerk("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    commands = re.findall(r"^  ([a-z]+)  ", shown.stdout, re.MULTILINE)
    assert commands == ["changes", "log", "prune", "send", "sync", "user", "users"]


@pytest.mark.parametrize("command", ["users", pytest.param("send", marks=pytest.mark.slow)])
def test_ends_with_one_message_if_the_settings_are_invalid(
    flask_clerk: RunProcess, command: str
) -> None:
    """The ``SettingsError`` is printed without a traceback, and the exit status is 2."""
    ended = flask_clerk(command, CLERK_WEBHOOK_SECRET="whsec_hidden!", CLERK_JWT_KEY="hidden!")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "CLERK_WEBHOOK_SECRET is not a signing secret" in ended.stderr
    assert "CLERK_JWT_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_is_the_same_command_in_the_service(service: Service) -> None:
    """``clerkhooks users`` reads the environment, as gunicorn does."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    variables = environ(**service.clerk.environ, DATABASE_URL=service.database_url)
    for command in (["clerkhooks"], ["flask", "--app", "wsgi", "clerk"]):
        ended = subprocess.run(
            [sys.executable, "-m", *command, "users", "--json"],
            cwd=PROJECT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert [user["id"] for user in json.loads(ended.stdout)["users"]] == [user_id]
