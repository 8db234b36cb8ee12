"""Account state: bans, deactivations and lockouts, from events and from a sync."""

from __future__ import annotations

import json
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from clerkhooks import create_app, current_user, require_auth
from clerkhooks.clerk.account import FOREVER, AccountState, parse_account_state
from clerkhooks.clerk.fake import clerk_id, event_body, user_data
from clerkhooks.store import queries
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.backend import Backend
from tests.conftest import SLOW_ON_POSTGRESQL, MakeService
from tests.racing import on_statement
from tests.server import Server
from tests.support import NOW_MS, Service, ThreadPool, deletion, load, user_event
from tests.syncing import make_old, store_of, sync

COLUMNS = ("banned_at", "deprovisioned_at", "locked_until")
LONG_AGO = NOW_MS - 3_600_000
LATE = datetime.fromtimestamp(NOW_MS / 1000, UTC)
NOTHING = (None, None, None)
PASSWORD = secrets.token_urlsafe(16)
BANNED, DEPROVISIONED, LOCKED = {"banned": True}, {"deprovisioned": True}, {"locked": True}


def state_of(service: Service, user_id: str) -> tuple[datetime | None, ...]:
    """Return the account state in the user's row."""
    found = service.user(user_id, COLUMNS)
    assert found is not None
    times = [datetime.fromisoformat(at) if isinstance(at, str) else at for at in found]
    return tuple(at and at.replace(tzinfo=at.tzinfo or UTC) for at in times)


def reason_of(service: Service, user_id: str) -> str | None:
    """Call the API as the user and return the reason of a 401, or None after a 200."""
    response = service.call(user_id)
    if response.status_code == 200:
        return None
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    return str(response.get_json()["reason"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (BANNED, "user_banned"),
        (DEPROVISIONED, "user_deprovisioned"),
        (BANNED | DEPROVISIONED, "user_banned"),
    ],
)
def test_refuses_a_barred_user_at_once(
    service: Service, fields: dict[str, Any], reason: str
) -> None:
    """A ban and a deactivation take effect on the next call, although the token is valid."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, "user.created", at=LONG_AGO))
    assert reason_of(service, user_id) is None
    service.outcome(user_event(user_id, **fields))
    assert reason_of(service, user_id) == reason
    presence = service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": True})
    assert (presence.status_code, presence.get_json()["reason"]) == (401, reason)


def test_admits_a_restored_user(service: Service) -> None:
    """The state is reversible: a later event without it readmits the user."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, at=LONG_AGO, banned=True, deprovisioned=True, locked=True))
    service.outcome(user_event(user_id, at=LONG_AGO + 1, deprovisioned=True))
    assert reason_of(service, user_id) == "user_deprovisioned"
    service.outcome(user_event(user_id))
    assert (state_of(service, user_id), reason_of(service, user_id)) == (NOTHING, None)


def test_keeps_the_state_of_the_newest_event(service: Service) -> None:
    """An older event that arrives late neither bans nor readmits a user."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, at=NOW_MS, banned=True))
    assert service.outcome(user_event(user_id, at=LONG_AGO)) == "stale"
    assert state_of(service, user_id) == (LATE, None, None)
    assert service.outcome(user_event(user_id, at=NOW_MS + 1)) == "applied"
    assert service.outcome(user_event(user_id, at=LONG_AGO, banned=True)) == "stale"
    assert reason_of(service, user_id) is None


def test_bans_a_user_whose_first_call_came_before_the_event(service: Service) -> None:
    """The row of a first call takes its state from any event, however old."""
    user_id = clerk_id("user")
    assert reason_of(service, user_id) is None
    service.outcome(user_event(user_id, at=LONG_AGO, banned=True))
    assert reason_of(service, user_id) == "user_banned"


@pytest.mark.parametrize("deleted_first", [False, True])
def test_erases_the_state_of_a_deleted_user(service: Service, deleted_first: bool) -> None:
    """A tombstone has no account state, and the reason of the 401 is the deletion."""
    user_id = clerk_id("user")
    bodies = [user_event(user_id, banned=True, deprovisioned=True, locked=True), deletion(user_id)]
    for body in reversed(bodies) if deleted_first else bodies:
        service.outcome(body)
    assert (state_of(service, user_id), reason_of(service, user_id)) == (NOTHING, "user_deleted")


@pytest.mark.parametrize(
    ("seconds", "until"),
    [(3600, LATE + timedelta(hours=1)), (0, LATE), (None, FOREVER), (2**62, FOREVER)],
)
def test_records_a_lockout_that_blocks_no_calls(
    service: Service, seconds: int | None, until: datetime
) -> None:
    """A lockout ends at the event's time plus Clerk's seconds, or never. Calls are served."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, locked=True, lockout_expires_in_seconds=seconds))
    assert state_of(service, user_id) == (None, None, until)
    assert reason_of(service, user_id) is None


def test_does_not_count_refused_calls_as_activity(service: Service) -> None:
    """The call of a barred user does not move ``last_seen``."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, banned=True))
    service.rows("UPDATE users SET last_seen = '2020-01-01 00:00:00.000000'")
    before = service.user(user_id, ["last_seen"])
    assert reason_of(service, user_id) == "user_banned"
    assert service.user(user_id, ["last_seen"]) == before


def test_refuses_a_barred_user_in_an_optional_view(service: Service) -> None:
    """A barred user is not an anonymous caller."""
    service.app.add_url_rule("/hi", "hi", require_auth(optional=True)(lambda: "hi"))
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, banned=True))
    response = service.call(user_id, path="/hi")
    assert (response.status_code, response.get_json()["reason"]) == (401, "user_banned")


def test_refuses_a_barred_user_in_every_worker(server: Server) -> None:
    """No worker remembers that the user was admitted, or refused, before."""
    user_id, at = clerk_id("user"), NOW_MS - 1000
    headers = {"Authorization": f"Bearer {server.clerk.session_token(user_id)}"}
    turns: list[tuple[dict[str, Any], int]] = [({}, 200), (BANNED, 401)]
    for number, (fields, status) in enumerate(turns * 2):
        assert server.deliver(user_event(user_id, at=at + number, **fields)).status == 200
        with ThreadPool(8) as pool:
            calls = [
                pool.submit(server.request, "GET", "/api/me", None, headers) for _ in range(24)
            ]
        assert {each.result(20).status for each in calls} == {status}


def test_shows_the_state_to_views(service: Service) -> None:
    """``current_user`` has the columns of the account state."""
    view = require_auth(lambda: [str(getattr(current_user, column)) for column in COLUMNS])
    service.app.add_url_rule("/state", "state", view)
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, locked=True, lockout_expires_in_seconds=60))
    until = str(LATE + timedelta(minutes=1))
    assert service.call(user_id, path="/state").get_json() == ["None", "None", until]


@pytest.mark.parametrize("fields", [{}, BANNED])
def test_needs_no_additional_query(service: Service, fields: dict[str, Any]) -> None:
    """
    A call reads the user's row with one statement, whether the user is barred or not.

    Without handlers for changes of the state, a delivery does not read the row.
    """
    user_id = clerk_id("user")
    statements: list[None] = []
    with on_statement(service, "SELECT", lambda: statements.append(None)):
        service.outcome(user_event(user_id, **fields))
    assert statements == []
    with on_statement(service, "", lambda: statements.append(None)):
        service.call(user_id)
    assert len(statements) == 1


def test_knows_the_fields_of_clerks_schema() -> None:
    """Built user objects have the fields of Clerk's schema, with values of their types."""
    types: dict[str, Any] = {"boolean": bool, "integer": int}
    data = user_data("user_1", email=None, first_name=None, last_name=None, updated_at=NOW_MS)
    for name, schema in load("account_state.json")["properties"].items():
        kinds = (types[schema["type"]], *([type(None)] if schema.get("nullable") else []))
        assert isinstance(data[name], kinds), name


@pytest.mark.parametrize("value", [None, 0, 1, "true", [], {}, "false"])
def test_ignores_states_of_a_wrong_type(value: Any) -> None:
    """A state that is not a boolean counts as absent."""
    data = {"banned": value, "deprovisioned": value, "locked": value}
    assert parse_account_state(data, NOW_MS, NOW_MS) == AccountState()


@pytest.mark.parametrize("seconds", ["60", True, -1, 1e300, float("inf"), [], 10**400])
def test_locks_for_ever_without_a_valid_duration(seconds: Any) -> None:
    """A malformed duration counts as absent. A time after the year 9999 cannot be stored."""
    data = {"locked": True, "lockout_expires_in_seconds": seconds}
    assert parse_account_state(data, NOW_MS, NOW_MS) == AccountState(locked_until=FOREVER)


def test_keeps_times_that_every_time_zone_can_show(service: Service) -> None:
    """An event from the last millisecond of the year 9999 is stored and can be read."""
    user_id = clerk_id("user")
    last = 253_402_300_799_999
    service.outcome(user_event(user_id, at=last, banned=True, locked=True))
    assert state_of(service, user_id) == (FOREVER, None, FOREVER)
    assert reason_of(service, user_id) == "user_banned"


@pytest.mark.parametrize("field", ["banned", "deprovisioned"])
def test_syncs_the_state(syncing: Service, backend: Backend, field: str) -> None:
    """A sync bars and readmits users, like events."""
    fields: dict[str, Any] = {field: True}
    user_id = backend.sign_up(at=LONG_AGO, **fields)
    sync(syncing, backend)
    assert reason_of(syncing, user_id) == f"user_{field}"
    assert sync(syncing, backend, check=True)[2].ok
    backend.update(user_id, **{field: False})
    sync(syncing, backend)
    assert (state_of(syncing, user_id), reason_of(syncing, user_id)) == (NOTHING, None)


def test_syncs_a_lockout_as_of_the_request(syncing: Service, backend: Backend) -> None:
    """Clerk's seconds count from the response, not from the user's last change."""
    user_id = backend.sign_up(at=LONG_AGO, locked=True, lockout_expires_in_seconds=600)
    before = datetime.now(UTC) - timedelta(milliseconds=1)  # times are in whole milliseconds
    sync(syncing, backend)
    until = state_of(syncing, user_id)[2]
    assert until is not None
    assert before + timedelta(minutes=10) <= until <= datetime.now(UTC) + timedelta(minutes=10)
    backend.update(user_id, lockout_expires_in_seconds=599, updated_at=LONG_AGO)
    assert sync(syncing, backend, check=True)[2].ok


def test_does_not_report_an_expired_lockout(syncing: Service, backend: Backend) -> None:
    """A lockout that has ended does not differ from a user who is not locked."""
    user_id = backend.sign_up(at=LONG_AGO)
    locked = backend.users[user_id] | LOCKED | {"lockout_expires_in_seconds": 60}
    syncing.outcome(event_body("user.updated", locked, LONG_AGO))
    summary, _, run = sync(syncing, backend, check=True)
    assert (summary, run.ok) == ({"unchanged": 1}, True)


@pytest.mark.parametrize("database_url", SLOW_ON_POSTGRESQL, indirect=True)
@pytest.mark.parametrize("here", [True, False], ids=["restored", "barred"])
@pytest.mark.parametrize("field", ["banned", "deprovisioned", "locked"])
def test_repairs_a_state_that_changed_without_a_new_version(
    syncing: Service, backend: Backend, field: str, here: bool
) -> None:
    """
    A sync compares the state even if ``updated_at`` is the same.

    Clerk does not document that a ban moves ``updated_at``. After the repair, events from before
    the request are stale, and later events are applied.
    """
    user_id = backend.sign_up(at=LONG_AGO)
    fields: dict[str, Any] = {field: here}
    event = user_event(user_id, at=LONG_AGO, **fields)
    syncing.outcome(event)
    backend.update(user_id, updated_at=LONG_AGO, **{field: not here})
    column = COLUMNS[("banned", "deprovisioned", "locked").index(field)]
    summary, [finding], run = sync(syncing, backend, check=True)
    assert (summary, run.ok) == ({"updated": 1}, False)
    assert (finding.kind, column in finding.fields) == ("differs", True)
    assert sync(syncing, backend)[0] == {"updated": 1}
    repaired = state_of(syncing, user_id)
    assert (repaired == NOTHING) is here
    assert sync(syncing, backend)[0] == {"unchanged": 1}
    assert syncing.outcome(event) == "stale"
    assert state_of(syncing, user_id) == repaired
    syncing.outcome(user_event(user_id, at=LONG_AGO + 1, **fields))
    assert (state_of(syncing, user_id) == NOTHING) is not here


def test_keeps_a_state_that_is_newer_than_the_request(syncing: Service, backend: Backend) -> None:
    """An event from after the request is newer than Clerk's answer, so it is not a difference."""
    user_id = backend.sign_up(at=LONG_AGO)
    later = int(time.time() * 1000) + 60_000
    data = backend.users[user_id] | BANNED
    syncing.outcome(event_body("user.updated", data, later))
    for check in (True, False):
        summary, findings, run = sync(syncing, backend, check=check)
        assert (summary, findings, run.ok) == ({"newer_here": 1}, [], True)
    assert reason_of(syncing, user_id) == "user_banned"


def test_erases_the_state_of_a_user_that_clerk_does_not_know(
    syncing: Service, backend: Backend
) -> None:
    """A tombstone that a sync writes has no account state, and later evidence restores it."""
    user_id, other = backend.sign_up(at=LONG_AGO, banned=True), backend.sign_up(at=LONG_AGO)
    sync(syncing, backend)
    make_old(syncing)
    data = backend.users.pop(user_id)
    sync(syncing, backend)
    assert (state_of(syncing, user_id), reason_of(syncing, user_id)) == (NOTHING, "user_deleted")
    assert reason_of(syncing, other) is None
    backend.users[user_id] = data
    sync(syncing, backend)
    assert reason_of(syncing, user_id) == "user_banned"


@pytest.mark.parametrize(
    ("fields", "described", "states"),
    [
        ({}, "-", []),
        (BANNED, "banned as of 20", ["banned"]),
        ({"locked": True}, "locked", ["locked"]),
        ({"locked": True, "lockout_expires_in_seconds": 3600}, "locked until 20", ["locked"]),
        ({"locked": True, "lockout_expires_in_seconds": 0}, "-", []),
        (BANNED | DEPROVISIONED, "deprovisioned as of", ["banned", "deprovisioned"]),
    ],
)
def test_shows_the_state_to_operators(
    make_service: MakeService, fields: dict[str, Any], described: str, states: list[str]
) -> None:
    """``user`` and the console show each state that holds, and ``users --barred`` lists users."""
    service = make_service(CONSOLE_PASSWORD=PASSWORD)
    user_id, other = clerk_id("user"), clerk_id("user")
    for each, data in ((other, {}), (user_id, fields)):
        service.outcome(user_event(each, first_name="Max", last_name=None, **data))
    runner = service.app.test_cli_runner()
    shown = runner.invoke(args=["clerk", "user", user_id]).stdout
    [account] = [line for line in shown.splitlines() if line.startswith("account ")]
    assert described in account
    whole = json.loads(runner.invoke(args=["clerk", "user", user_id, "--json"]).stdout)
    assert [whole["user"][column] is not None for column in COLUMNS] == [
        bool(fields.get(name)) for name in ("banned", "deprovisioned", "locked")
    ]
    barred = json.loads(runner.invoke(args=["clerk", "users", "--barred", "--json"]).stdout)
    expected = [user_id] if {"banned", "deprovisioned"} & set(states) else []
    assert [user["id"] for user in barred["users"]] == expected
    page = service.http.get(f"/console/users/{user_id}", auth=("", PASSWORD)).text
    listed = service.http.get("/console/users", auth=("", PASSWORD)).text
    only_barred = service.http.get("/console/users?show=barred", auth=("", PASSWORD)).text
    overview = service.http.get("/console", auth=("", PASSWORD)).text
    for state in ("banned", "deprovisioned", "locked"):
        badge = f'<span class="badge {state}">{state}</span>'
        assert (badge in page, badge in listed) == (state in states, state in states)
    assert (user_id in only_barred) is bool(expected)
    assert f"Banned or deprovisioned</a></dt><dd>{len(expected)}</dd>" in overview


def test_counts_barred_users(make_service: MakeService) -> None:
    """The metrics count users by state, and refused calls by reason."""
    service = make_service(METRICS_TOKEN=PASSWORD)
    states: list[dict[str, Any]] = [BANNED, DEPROVISIONED, BANNED | DEPROVISIONED, BANNED, LOCKED]
    for fields in states:
        service.outcome(user_event(banned := clerk_id("user"), **fields))
        service.call(banned)
    headers = {"Authorization": f"Bearer {PASSWORD}"}
    lines = service.http.get("/metrics", headers=headers).text.splitlines()
    assert 'clerkhooks_users_barred{state="banned"} 3.0' in lines
    assert 'clerkhooks_users_barred{state="deprovisioned"} 2.0' in lines
    assert 'clerkhooks_sessions_refused_total{reason="user_banned"} 3.0' in lines
    assert 'clerkhooks_sessions_refused_total{reason="user_deprovisioned"} 1.0' in lines


def test_lists_barred_users_with_an_index(service: Service) -> None:
    """Neither the list nor the counts read the whole table."""
    store = store_of(service)
    query = queries.list_users(store, barred=True)._select().where(queries.is_barred(store.users))
    text = str(query.compile(store.database.engine, compile_kwargs={"literal_binds": True}))
    is_sqlite = service.database_url.startswith("sqlite")
    with store.database.connect() as connection:
        if not is_sqlite:
            connection.exec_driver_sql("SET enable_seqscan = off")
        explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
        plan = connection.exec_driver_sql(f"{explain} {text} ORDER BY created_at").all()
        connection.invalidate()
    assert "ix_users_barred" in str(plan)


def test_reports_drift_without_values(syncing: Service, backend: Backend) -> None:
    """``sync --check`` names the fields that differ. With ``--json``, it shows both values."""
    user_id = backend.sign_up(at=LONG_AGO)
    sync(syncing, backend)
    backend.update(user_id, banned=True, updated_at=LONG_AGO + 1)
    runner = syncing.app.test_cli_runner()
    printed = runner.invoke(args=["clerk", "sync", "--check"])
    assert (printed.exit_code, f"{user_id} differs: banned_at" in printed.stdout) == (1, True)
    line = runner.invoke(args=["clerk", "sync", "--check", "--json"]).stdout.splitlines()[0]
    at = datetime.fromtimestamp((LONG_AGO + 1) / 1000, UTC)
    assert json.loads(line)["fields"] == {"banned_at": {"here": None, "clerk": at.isoformat()}}


def test_builds_events_of_barred_users(clerk_service: ClerkService) -> None:
    """``clerk_service.update`` bans and restores a user, and keeps the other fields."""
    user_id = clerk_service.sign_up(first_name="Grace", last_name="Hopper", email=None)
    client = clerk_service.client(user_id)
    clerk_service.update(user_id, banned=True)
    assert client.get("/api/me").get_json()["reason"] == "user_banned"
    clerk_service.update(user_id, banned=False, deprovisioned=True)
    assert client.get("/api/me").get_json()["reason"] == "user_deprovisioned"
    clerk_service.update(user_id, deprovisioned=False)
    assert client.get("/api/me").get_json()["name"] == "Grace Hopper"
    clerk_service.update("user_2unknown", banned=True)
    assert clerk_service.client("user_2unknown").get("/api/me").status_code == 401
    with pytest.raises(AssertionError, match=r"user\.updated was answered with 400"):
        clerk_service.update("ada")


def test_sends_events_of_barred_users(server: Server) -> None:
    """The options of ``send`` set the account state."""
    user_id = clerk_id("user")
    app = create_app(
        server.clerk.environ | {"DATABASE_URL": server.database_url, "PORT": str(server.port)}
    )
    options = ("--banned", "--deprovisioned", "--locked")
    for given in (options, ()):
        arguments = ["clerk", "send", "user.updated", "--user", user_id, *given]
        assert app.test_cli_runner().invoke(args=arguments).exit_code == 0
        [found] = server.rows(f"SELECT {', '.join(COLUMNS)} FROM users WHERE id = '{user_id}'")
        assert [at is not None for at in found] == [bool(given)] * 3
    disconnect(app)
