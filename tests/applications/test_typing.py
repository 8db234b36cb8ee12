"""The errors that ``mypy --strict`` reports for an application."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import PROJECT
from clerkhooks.testing import ClerkService
from tests.applications import typed
from tests.applications.support import check_users_stay_correct, configuration, tables
from tests.generate_payloads import Generator
from tests.support import load, rows

TYPED = Path(typed.__file__)
BEFORE = """\
from collections.abc import Callable
from clerkhooks import ClerkHooks, Event, current_user, payloads, require_auth, upsert
from tests.applications.typed import Base, Organization, User, db, hooks

def no_argument() -> None: ...
def for_user(event: Event[payloads.User]) -> None: ...
def for_role(event: Event[payloads.Role]) -> None: ...
event: Event
member: Event[payloads.OrganizationMembership]
"""
# Lines with one error each, and mypy's codes for these errors.
WRONG = {
    "hooks.current_user.nickname": "attr-defined",
    "current_user.username": "attr-defined",
    "hooks.optional_user.username": "union-attr",
    "hooks.optional_session.has(plan='pro')": "union-attr",
    "number: int = hooks.current_user.plan": "assignment",
    "hooks.model.nickname": "attr-defined",
    "hooks.on('user.created')(no_argument)": "type-var",
    "hooks.on('user.deleted')(for_user)": "type-var",
    "hooks.on('user.*')(for_user)": "type-var",
    "hooks.on('user.barred')(for_role)": "type-var",
    "hooks.on('organization.created', after_commit=True)(for_user)": "type-var",
    "hooks.on('user.created', durable=True)(for_user)": "type-var",
    "hooks.on('user.created', after=True)": "call-overload",
    "member.data['public_user_date']": "typeddict-item",
    "member.data['organization']['id'].nickname": "attr-defined",
    "ClerkHooks(db, Organization)": "type-var",
    "require_auth(rolle='org:admin')": "call-overload",
    "upsert(User, None, id='user_1')": "arg-type",
    "upsert(Base, event)": "arg-type",
}


def handlers_of_every_event() -> Iterator[str]:
    """Yield a handler for each event type, which must accept exactly the type of its data."""
    generator = Generator(load("events.json"))
    assert len(generator.data) == 45
    for number, (event_type, name) in enumerate((generator.data | generator.changes).items()):
        yield f"@hooks.on({event_type!r})"
        yield f"def handler{number}(event: Event[payloads.{name}]) -> None: ..."
        yield f"same{number}: Callable[[Event[payloads.{name}]], None] = handler{number}"


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, set[str]]]:
    """Run mypy on a correct and an incorrect file; return its error codes by file and line."""
    wrong = tmp_path_factory.mktemp("typing") / "wrong.py"
    wrong.write_text(BEFORE + "\n".join(WRONG) + "\n")
    every = wrong.with_name("every.py")
    every.write_text(BEFORE + "\n".join(handlers_of_every_event()) + "\n")
    cache = PROJECT / ".mypy_cache" / "applications"
    options = ("--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={cache}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--no-pretty", str(TYPED), str(wrong), str(every)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, dict[int, set[str]]] = {"typed.py": {}, "wrong.py": {}, "every.py": {}}
    for path, line, code in re.findall(r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.M):
        found[Path(path).name].setdefault(int(line), set()).add(code)
    return found


@pytest.mark.slow
def test_reports_nothing_in_a_correct_application(
    errors: dict[str, dict[int, set[str]]],
) -> None:
    """Code with declared columns, optional users, handlers and async views needs no casts."""
    assert errors["typed.py"] == {}
    assert not re.search(r"\bcast\(|type: ignore|\bAny\b", TYPED.read_text())


@pytest.mark.slow
def test_knows_the_data_of_every_event(errors: dict[str, dict[int, set[str]]]) -> None:
    """Each event type accepts a handler for its own data."""
    assert errors["every.py"] == {}


@pytest.mark.slow
def test_reports_every_mistake(errors: dict[str, dict[int, set[str]]]) -> None:
    """Unknown columns, unchecked optional users and wrong arguments are errors."""
    first = BEFORE.count("\n") + 1
    expected = {first + number: {code} for number, code in enumerate(WRONG.values())}
    assert errors["wrong.py"] == expected


def test_runs_the_typed_application(
    clerk: FakeClerk, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that mypy accepts also works at run time."""
    for name, value in configuration(clerk, url).items():
        monkeypatch.setenv(name if name.startswith("CLERK_") else f"SHOP_{name}", value)
    app = typed.create_app()
    with tables(app):
        check_users_stay_correct(app, clerk, "/clerk/api/me")
        service = ClerkService(app, clerk)
        ada = service.sign_up(username="ada", public_metadata={"tier": "gold"})
        client = service.client(ada)
        body = client.get("/me").get_json()
        assert (body["username"], body["plan"], body["label"]) == ("ada", "free", "ada")
        assert client.get("/later").text == "GOLD"
        assert client.get("/open").text == "Hello ada, False"
        assert service.http.get("/open").text == "Please sign in."
        assert client.get(f"/profile/{ada}").text == "free"
        assert client.get("/plain/7").status_code == 403
        admin = service.client(ada, role="org:admin", organization="org_1", fva=[0, 0])
        assert admin.get("/plain/7").text == "ada@example.org org_1"
        typed.received.clear()
        typed.erased.clear()
        gone = {"deleted": True, "id": ada, "object": "user", "external_id": "567772"}
        assert service.deliver("user.deleted", gone).status_code == 200
        assert typed.erased == ["567772"]
        data = {"id": "org_1", "name": "Acme", "updated_at": 1_700_000_000_000}
        assert service.deliver("organization.created", data, "msg_1").status_code == 200
        assert service.deliver("organization.created", data, "msg_1").status_code == 200
        older = data | {"name": "Old", "updated_at": 1_600_000_000_000}
        assert service.deliver("organization.updated", older).status_code == 200
        assert rows(url, "SELECT id, name FROM organizations") == [("org_1", "Acme")]
        assert [one[0] for one in typed.received] == [
            "organization.created",
            "organization.updated",
        ]
        response = service.http.get("/clerk/healthz")
        assert response.get_json() == {"status": "ok"}
