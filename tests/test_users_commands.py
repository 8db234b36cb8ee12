"""``flask users list`` and ``flask users show``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import Result

from clerkhooks.cli.pretend import clerk_id
from tests.support import NOW_MS, Service, deletion, user_event


def run(service: Service, *arguments: str) -> Result:
    """Run a command as ``flask --app wsgi users`` does."""
    return service.app.test_cli_runner().invoke(args=["users", *arguments])


def listed(service: Service, *arguments: str) -> list[str]:
    """The ids that a list shows, as JSON; the table must show the same."""
    users = json.loads(run(service, "list", *arguments, "--json").stdout)["users"]
    table = run(service, "list", *arguments).stdout
    assert [line.split()[0] for line in table.splitlines()[1:] if line] == [user["id"] for user in users] or table == "No such user.\n"
    return [user["id"] for user in users]


@pytest.fixture
def people(service: Service) -> dict[str, str]:
    """A user of each kind, the oldest first."""
    ids = {name: clerk_id("user") for name in ("ada", "grace", "unfilled", "deleted")}
    service.outcome(user_event(ids["ada"]))
    service.outcome(user_event(ids["grace"], first_name="grace", last_name="Hopper%", email_addresses=[]))
    service.call(ids["unfilled"])
    service.outcome(deletion(ids["deleted"]))
    return ids


def test_lists_the_newest_first(service: Service, people: dict[str, str]) -> None:
    """All of them, or the tombstones, or what nothing has filled in."""
    assert listed(service) == list(people.values())[::-1]
    assert listed(service, "--deleted") == [people["deleted"]]
    assert listed(service, "--unsynced") == [people["unfilled"]]
    assert run(service, "list", "--deleted", "--unsynced").exit_code == 2


def test_finds_by_id_email_and_beginning_of_the_name(service: Service, people: dict[str, str]) -> None:
    """Or of the last name, whatever the case; a percent sign is one."""
    assert listed(service, people["ada"]) == [people["ada"]]
    assert listed(service, "ADA@example.org") == [people["ada"]]
    assert listed(service, "Grace h") == listed(service, "hopper") == [people["grace"]]
    for nobody in ("%", "opper", "race", "ada@example.com", "user_", clerk_id("user")):
        assert listed(service, nobody) == []
    assert listed(service, "grace hopper%") == [people["grace"]]


def test_says_what_no_database_can_hold(service: Service) -> None:
    """A byte of an argument that is no UTF-8 comes as half a character."""
    ended = run(service, "list", "\udcff")
    assert ended.exit_code == 2
    assert "cannot hold some characters" in ended.output


def test_goes_on_where_a_page_ended(service: Service, people: dict[str, str]) -> None:
    """Page by page, each user once; the text says how."""
    read: list[str] = []
    arguments: list[str] = []
    while True:
        page: dict[str, Any] = json.loads(run(service, "list", "--limit", "3", *arguments, "--json").stdout)
        read += [user["id"] for user in page["users"]]
        if page["next"] is None:
            break
        assert f"--after {page['next']}" in run(service, "list", "--limit", "3", *arguments).stderr
        arguments = ["--after", page["next"]]
    assert read == list(people.values())[::-1]
    assert run(service, "list", "--after", "yesterday").exit_code == 2


def test_shows_a_user_and_why(service: Service, people: dict[str, str]) -> None:
    """The row, what filled it, and its messages."""
    service.outcome(user_event(people["ada"], at=NOW_MS - 1), "msg_late")
    shown = run(service, "show", people["ada"])
    assert shown.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines()[:10])
    assert (lines["id"], lines["email"], lines["name"], lines["deleted_at"]) == (people["ada"], "ada@example.org", "Ada Lovelace", "-")
    assert lines["filled"].startswith("by   webhook, as of 20")
    assert "msg_late" in shown.stdout
    whole = json.loads(run(service, "show", people["ada"], "--json").stdout)
    assert (whole["user"]["source"], whole["user"]["version_updated_at"]) == ("webhook", NOW_MS)
    assert [message["outcome"] for message in whole["messages"]] == ["stale", "applied"]


def test_says_what_made_each_row(service: Service, people: dict[str, str]) -> None:
    """A first call, or the user's end; the rest is told where syncs are."""
    sources = {name: json.loads(run(service, "show", user_id, "--json").stdout)["user"]["source"] for name, user_id in people.items()}
    assert sources == {"ada": "webhook", "grace": "webhook", "unfilled": "first call", "deleted": "user.deleted"}
    assert "filled by   first call\n" in run(service, "show", people["unfilled"]).stdout


def test_says_that_there_is_no_such_user(service: Service) -> None:
    """With status 1, and how to get one who is at Clerk."""
    user_id = clerk_id("user")
    text, as_json = run(service, "show", user_id), run(service, "show", user_id, "--json")
    assert (text.exit_code, as_json.exit_code) == (1, 1)
    assert f"users sync {user_id}" in text.stdout
    assert json.loads(as_json.stdout) == {"user": None, "messages": []}


def test_shows_hostile_names_as_text(service: Service) -> None:
    """No control character, escape or bidirectional override reaches the terminal."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, first_name="\x1b[31mred\r\n", last_name="\u202egnp.exe\u2028"))
    for output in (run(service, "list").stdout, run(service, "show", user_id).stdout):
        assert "red" in output
        assert not set(output.replace("\n", "")) & set("\x1b\r\u202e\u2028")


def test_says_that_the_database_fails(unreachable: Service) -> None:
    """Status 2, without a traceback and without the database's own words."""
    for arguments in (["list"], ["show", clerk_id("user")]):
        result = run(unreachable, *arguments)
        assert (result.exit_code, "The database failed (OperationalError" in result.output) == (2, True)
