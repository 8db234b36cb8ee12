"""
Fixtures for databases and services, and a deadline for every test.

The databases are SQLite files and a PostgreSQL server. The server is started here unless
``TEST_DATABASE_URL`` names one.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psycopg
import pytest
from flask_migrate import upgrade
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from psycopg import sql
from sqlalchemy.engine import make_url

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.service import db
from clerkhooks.web.state import disconnect
from tests.backend import Backend
from tests.server import Server, serving
from tests.support import Service

pytest_plugins = ["clerkhooks.testing"]

hypothesis_settings.register_profile(
    "suite",
    max_examples=24,  # .ci/run tries more
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
for name, max_examples in (("extended", 100), ("thorough", 2000)):
    hypothesis_settings.register_profile(
        name, hypothesis_settings.get_profile("suite"), max_examples=max_examples
    )
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

KINDS = ("sqlite", "postgresql")
SLOW_ON_SQLITE = [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"]
SLOW_ON_POSTGRESQL = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]
TABLES = (
    "users",
    "organizations",
    "organization_memberships",
    "webhook_messages",
    "clerk_leases",
    "clerk_awaited_webhooks",
    "user_changes",
)
TIMEOUT = 300  # seconds for a phase of a test, multiplied by four if the test is marked as slow
EXIT_TIMEOUT = 60  # seconds that the process may take to exit after the last test
MakeDatabase = Callable[[str], str]


@contextmanager
def _deadline(item: pytest.Item) -> Iterator[None]:
    """Fail *item* if the block takes too long, regardless of the cause."""
    seconds = TIMEOUT * (4 if item.get_closest_marker("slow") else 1)
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        seconds *= 30

    def fail(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"did not end within {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    # The timer repeats, because it may also have to interrupt a clean-up that hangs.
    signal.setitimer(signal.ITIMER_REAL, seconds, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Limit the duration of a test's fixtures."""
    with _deadline(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Limit the duration of a test."""
    with _deadline(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Limit the duration of the clean-up after a test."""
    with _deadline(item):
        yield


def pytest_unconfigure() -> None:
    """Kill the process if a running thread keeps it from exiting."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller terminates its workers
        return
    stderr = 2
    faulthandler.dump_traceback_later(EXIT_TIMEOUT, exit=True, file=stderr)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Return the URL of a PostgreSQL server on which tests can create databases."""
    named = os.environ.get("TEST_DATABASE_URL")
    if named:
        yield named
        return
    with started_postgresql() as url:
        yield url


@contextmanager
def started_postgresql() -> Iterator[str]:
    """Run a PostgreSQL server until the block ends; yield its URL."""
    # Imported here because this module is not needed with TEST_DATABASE_URL.
    from tests.dedicated_postgresql import dedicated_postgresql

    with dedicated_postgresql() as started:
        with psycopg.connect(started.url, autocommit=True) as connection:
            for setting in ("fsync", "full_page_writes"):  # its data need not survive a crash
                connection.execute(sql.SQL("ALTER SYSTEM SET {} = off").format(sql.SQL(setting)))
            connection.execute("SELECT pg_reload_conf()")
        yield started.url


@pytest.fixture(scope="session")
def make_database(
    postgresql: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeDatabase]:
    """Create empty databases of a given kind and return their URLs."""
    made: list[str] = []

    def make(kind: str) -> str:
        name = f"clerkhooks_{secrets.token_hex(6)}"
        if kind == "sqlite":
            return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/{name}.db"
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        made.append(name)
        url = make_url(postgresql).set(drivername="postgresql", database=name)
        return url.render_as_string(hide_password=False)

    yield make
    if "TEST_DATABASE_URL" not in os.environ:  # the server was started here, and is deleted
        return
    with psycopg.connect(postgresql, autocommit=True) as connection:
        for name in made:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


@pytest.fixture(scope="session")
def emptied_database(make_database: MakeDatabase) -> MakeDatabase:
    """
    Return the URL of an empty database of a given kind.

    Tests use the same PostgreSQL database in turn: emptying it is faster than creating another.
    """
    shared: list[str] = []

    def empty(kind: str) -> str:
        if kind == "sqlite":
            return make_database(kind)
        if shared:
            empty_postgresql(shared[0])
        else:
            shared.append(make_database(kind))
        return shared[0]

    return empty


def empty_postgresql(url: str) -> None:
    """End the other sessions in the database, and drop its schemas and settings."""
    with psycopg.connect(url, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(name))
        schemas = connection.execute(
            "SELECT nspname FROM pg_namespace"
            " WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'"
        ).fetchall()
        with connection.transaction():
            for (schema,) in schemas:
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
            connection.execute("CREATE SCHEMA public")


MigratedUrl = Callable[[str], str]


@pytest.fixture(scope="session")
def migrated_url(make_database: MakeDatabase, clerk: FakeClerk) -> MigratedUrl:
    """Create and migrate one database of each kind per session; return its URL."""
    ready: dict[str, str] = {}

    def url_of(kind: str) -> str:
        if kind not in ready:
            ready[kind] = make_database(kind)
            migrate(ready[kind], clerk)
        return ready[kind]

    return url_of


def migrate(url: str, clerk: FakeClerk, **variables: str) -> None:
    """Upgrade the database at *url* to the newest migration."""
    app = create_app(clerk.environ | {"DATABASE_URL": url} | variables)
    with app.app_context():
        upgrade()
        if url.startswith("sqlite"):  # so that the file can be copied without its WAL
            db.session.execute(db.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    disconnect(app)


@pytest.fixture(scope="module", params=SLOW_ON_SQLITE)
def server(
    request: pytest.FixtureRequest,
    make_database: MakeDatabase,
    clerk: FakeClerk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Run the real server on a database of each kind. The tests of a module share the server."""
    url = make_database(request.param)
    migrate(url, clerk)
    with serving(url, clerk, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, migrated_url: MigratedUrl, tmp_path: Path) -> str:
    """Return the URL of a migrated, empty database. The test runs once for each kind."""
    url = migrated_url(request.param)
    if request.param == "sqlite":
        copy = tmp_path / "clerkhooks.db"
        shutil.copy(url.removeprefix("sqlite:///"), copy)
        return f"sqlite:///{copy}"
    with psycopg.connect(url) as connection:
        used = [
            table
            for table in TABLES
            if connection.execute(f"SELECT FROM {table} LIMIT 1").fetchone() is not None
        ]
        if used:
            connection.execute(f"TRUNCATE {', '.join(used)}")
    return url


MakeService = Callable[..., Service]


@pytest.fixture
def make_service(database_url: str, clerk: FakeClerk) -> Iterator[MakeService]:
    """Create services on the database. Keyword arguments set variables, or unset them if None."""
    made: list[Service] = []

    def make(clerk: FakeClerk = clerk, **variables: str | None) -> Service:
        environ = clerk.environ | {"DATABASE_URL": database_url} | variables
        config = {name: value for name, value in environ.items() if value is not None}
        made.append(Service(create_app(config), clerk, database_url))
        return made[-1]

    yield make
    for service in made:
        disconnect(service.app)


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """Create the service on a database of each kind."""
    return make_service()


@pytest.fixture
def organizations(make_service: MakeService) -> Service:
    """Create the service with tables of organizations and memberships."""
    return make_service(CLERK_TABLES="organizations")


@pytest.fixture
def make_unreachable(clerk: FakeClerk, tmp_path: Path) -> MakeService:
    """Create services whose database is unreachable. Keyword arguments set variables."""

    def make(**variables: str) -> Service:
        folder = tmp_path / "gone"
        folder.mkdir()
        url = f"sqlite:///{folder}/clerkhooks.db"
        service = Service(create_app(clerk.environ | {"DATABASE_URL": url} | variables), clerk, url)
        folder.rmdir()
        return service

    return make


@pytest.fixture
def unreachable(make_unreachable: MakeService) -> Service:
    """Create a service whose database is unreachable."""
    return make_unreachable()


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Serve a fake Backend API over HTTP. It has no users yet."""
    with Backend().open() as backend:
        yield backend


@pytest.fixture
def syncing(make_service: MakeService, backend: Backend) -> Service:
    """Create the service with access to the Backend API."""
    return make_service(**backend.environ)
