"""The service behind PgBouncer, in session mode and in transaction mode."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy.engine import make_url

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.doctor import diagnose
from clerkhooks.doctor.database import check_database
from clerkhooks.sync.connections import AlreadyRunning, sole_writer
from clerkhooks.web.state import disconnect
from tests.backend import Backend
from tests.conftest import MakeDatabase, migrate
from tests.pgbouncer import pgbouncer
from tests.support import NOW_MS, Service, ThreadPool, deletion, user_event
from tests.syncing import store_of, sync

pytestmark = pytest.mark.slow
# Other tests use the same server at the same time, so each query covers only its own database.
ADVISORY_LOCKS = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
    " (SELECT oid FROM pg_database WHERE datname = current_database())"
)
WAITING_STATEMENTS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
SESSION_OPTIONS: tuple[dict[str, str], ...] = ({}, {"ignore_startup_parameters": "options"})


@pytest.fixture
def empty_url(make_database: MakeDatabase) -> str:
    """Create an empty PostgreSQL database whose time zone is not UTC."""
    url = make_database("postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"ALTER DATABASE {connection.info.dbname} SET timezone = 'Asia/Kolkata'".encode()
        )
    return url


@contextmanager
def serving(clerk: FakeClerk, url: str, direct_url: str, pooler: str) -> Iterator[Service]:
    """Migrate the database at *url* and create the service; tests query *direct_url*."""
    variables = {"DATABASE_POOLER": pooler} if pooler else {}
    clerk_environ = clerk.environ | variables
    migrate(url, clerk, **variables)
    app = create_app(clerk_environ | {"DATABASE_URL": url})
    try:
        yield Service(app, clerk, direct_url)
    finally:
        disconnect(app)


def use(service: Service, rounds: int) -> set[int]:
    """Deliver events and call the API from 16 threads; return the distinct status codes."""

    def run(_: int) -> set[int]:
        codes: set[int] = set()
        for _ in range(rounds):
            user_id, first_id = clerk_id("user"), clerk_id("user")
            codes |= {
                service.deliver(user_event(user_id)).status_code,
                service.deliver(user_event(user_id, at=NOW_MS + 1)).status_code,
                service.call(user_id).status_code,
                service.call(first_id).status_code,
                service.call(
                    first_id, "PUT", "/api/me/presence", body={"isOnline": True}
                ).status_code,
                service.deliver(deletion(user_id, at=NOW_MS + 2)).status_code,
            }
        return codes

    with ThreadPool(16) as pool:
        return set().union(*pool.map(run, range(16), timeout=120))


def limits_of(service: Service) -> tuple[str, str, str]:
    """Return the server settings in effect for the service's statements."""
    names = ("lock_timeout", "statement_timeout", "timezone")
    with service.app.extensions["clerkhooks"].store.database.connect() as connection:
        found = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
    return (str(found[0]), str(found[1]), str(found[2]))


def check_times(service: Service) -> None:
    """Check that times are correct although the database's time zone is not UTC."""
    user_id, now = clerk_id("user"), datetime.now(UTC)
    assert service.outcome(user_event(user_id, at=NOW_MS)) == "applied"
    last_seen = datetime.fromisoformat(service.call(user_id).get_json()["lastSeen"])
    assert abs(last_seen - now) < timedelta(seconds=10)
    [(occurred_at,)] = service.rows(
        "SELECT extract(epoch FROM occurred_at) FROM webhook_messages "
        f"WHERE clerk_user_id = '{user_id}'"
    )
    assert round(occurred_at * 1000) == NOW_MS


@pytest.mark.parametrize("options", SESSION_OPTIONS, ids=["default", "ignores options"])
@pytest.mark.parametrize("pooler", ["", "session"])
def test_works_in_session_mode(
    clerk: FakeClerk, empty_url: str, options: dict[str, str], pooler: str
) -> None:
    """In session mode, the service works, and its timeouts are in effect."""
    with (
        pgbouncer(empty_url, "session", **options) as url,
        serving(clerk, url, empty_url, pooler) as service,
    ):
        assert use(service, rounds=2) == {200}
        assert limits_of(service) == ("2s", "3s", "UTC")
        check_times(service)


def test_works_in_transaction_mode(clerk: FakeClerk, empty_url: str) -> None:
    """No statement depends on session state from an earlier statement."""
    with (
        pgbouncer(empty_url, "transaction", default_pool_size="4") as url,
        serving(clerk, url, empty_url, "transaction") as service,
    ):
        assert use(service, rounds=10) == {200}
        assert limits_of(service) == ("2s", "3s", "UTC")
        check_times(service)


def test_leaves_no_state_on_server_connections(clerk: FakeClerk, empty_url: str) -> None:
    """In transaction mode, no setting, prepared statement or lock is left for the next client."""
    with (
        pgbouncer(empty_url, "transaction", default_pool_size="1") as url,
        serving(clerk, url, empty_url, "transaction") as service,
    ):
        assert use(service, rounds=1) == {200}
        with psycopg.connect(url, prepare_threshold=None) as other:
            found = other.execute(
                "SELECT current_setting('lock_timeout'), current_setting('statement_timeout'), "
                f"(SELECT count(*) FROM pg_prepared_statements), ({ADVISORY_LOCKS})".encode()
            ).fetchone()
    assert found == ("0", "0", 0, 0)


def test_limits_waits_in_transaction_mode(clerk: FakeClerk, empty_url: str) -> None:
    """A delivery for a locked row fails after two seconds, and no statement keeps waiting."""
    user_id = clerk_id("user")
    with (
        pgbouncer(empty_url, "transaction") as url,
        serving(clerk, url, empty_url, "transaction") as service,
        psycopg.connect(empty_url) as other,
    ):
        assert service.outcome(user_event(user_id)) == "applied"
        other.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", [user_id])
        started_at = time.monotonic()
        assert service.deliver(user_event(user_id, at=NOW_MS + 1)).status_code == 500
        assert time.monotonic() - started_at < 3
        assert service.rows(WAITING_STATEMENTS) == [(0,)]


@pytest.mark.parametrize(
    ("mode", "named", "found"),
    [
        ("transaction", "", True),
        ("transaction", "transaction", False),
        ("session", "", False),
    ],
)
def test_lets_doctor_recognize_a_transaction_pooler(
    clerk: FakeClerk, empty_url: str, mode: str, named: str, found: bool
) -> None:
    """In transaction mode, doctor asks for ``DATABASE_POOLER`` if the variable is not set."""
    migrate(empty_url, clerk)
    with pgbouncer(empty_url, mode) as url:
        values = clerk.environ | {"DATABASE_URL": url, "DATABASE_POOLER": named}
        codes = [finding.code for finding in diagnose(values, checks=[check_database])]
    assert codes[0] == "database_ready"
    assert ("database_pooler_unnamed" in codes) is found


def test_allows_one_sync_at_a_time_through_a_transaction_pooler(
    clerk: FakeClerk, empty_url: str, backend: Backend
) -> None:
    """A sync's lock works through the pooler and is released when the sync ends."""
    user_id = backend.sign_up(at=1_700_000_000_000)
    with (
        pgbouncer(empty_url, "transaction") as url,
        serving(clerk, url, empty_url, "transaction") as service,
    ):
        store = store_of(service)
        with sole_writer(store), pytest.raises(AlreadyRunning), sole_writer(store):
            pass
        assert sync(service, backend)[0] == {"created": 1}
        assert service.user(user_id) is not None
        assert service.rows(ADVISORY_LOCKS) == [(0,)]


def test_keeps_its_tables_in_the_schema_of_its_role(clerk: FakeClerk, empty_url: str) -> None:
    """In transaction mode, a role's search_path applies; other schemas are not touched."""
    role = f"clerkhooks_{secrets.token_hex(4)}"
    with psycopg.connect(empty_url, autocommit=True) as connection:
        for statement in (
            "CREATE TABLE users (id INTEGER PRIMARY KEY, nickname TEXT)",
            f"CREATE ROLE {role} LOGIN",
            f"CREATE SCHEMA clerkhooks AUTHORIZATION {role}",
            f"ALTER ROLE {role} SET search_path = clerkhooks",
        ):
            connection.execute(statement.encode())
    own_url = make_url(empty_url).set(username=role).render_as_string(hide_password=False)
    try:
        with (
            pgbouncer(own_url, "transaction") as url,
            serving(clerk, url, own_url, "transaction") as service,
        ):
            assert use(service, rounds=1) == {200}
            assert service.rows("SELECT count(*) > 0 FROM clerkhooks.users") == [(True,)]
    finally:
        with psycopg.connect(empty_url, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role} CASCADE".encode())
            connection.execute(f"DROP ROLE {role}".encode())
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'users'"
    with psycopg.connect(empty_url) as connection:
        assert connection.execute(columns).fetchone() == (2,)
