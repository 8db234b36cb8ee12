"""Applications with unusual tables, binds or engines."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, cast

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column, relationship
from sqlalchemy.pool import NullPool

from clerkhooks import ClerkHooks, ClerkUser, Event, current_user, from_clerk, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables
from tests.conftest import MakeDatabase
from tests.support import NOW_MS, ThreadPool, rows, user_event


def create_app(clerk: FakeClerk, url: str, db: SQLAlchemy, model: Any = None, **more: Any) -> Flask:
    """Create an application with *db* and *model*."""
    app = Flask(__name__)
    app.config.update(configuration(clerk, url, **more))
    db.init_app(app)
    ClerkHooks(db, model).init_app(app) if model is not None else ClerkHooks(db).init_app(app)
    return app


def test_keeps_users_in_a_table_of_any_name(clerk: FakeClerk, url: str) -> None:
    """A model may use any table name, including reserved words."""
    db = make_db()

    class Staff(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "Order"
        __table_args__ = (
            sa.Index("own_index", "group"),
            sa.CheckConstraint("plan <> ''", name="plan_named"),
            {"comment": "People"},
        )
        group: Mapped[str | None] = from_clerk("public_metadata.group")
        name_at_clerk: Mapped[str | None] = from_clerk("username", "Full Name")
        plan: Mapped[str] = mapped_column(server_default="free")

    app = create_app(clerk, url, db, User)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        service.sign_up(username="ada", public_metadata={"group": "x"}, email="new@example.org")
        query = """SELECT "group", "Full Name", plan FROM "Order" WHERE email = 'new@example.org'"""
        assert rows(url, query) == [("x", "ada", "free")]
        assert rows(url, "SELECT * FROM users") == []


def test_keeps_users_in_a_schema(clerk: FakeClerk, postgresql_url: str) -> None:
    """All clerkhooks tables are in the model's schema."""
    db = make_db()

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        __table_args__: ClassVar = {"schema": "accounts"}

    class Note(db.Model):  # type: ignore[name-defined, misc]
        __table_args__: ClassVar = {"schema": "accounts"}
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[str] = mapped_column(sa.ForeignKey("accounts.users.id"))

    rows(postgresql_url, "CREATE SCHEMA accounts")
    app = create_app(clerk, postgresql_url, db, User)
    with tables(app):
        check_users_stay_correct(app, clerk)
        found = "SELECT table_schema FROM information_schema.tables WHERE table_name IN "
        found += "('users', 'webhook_messages')"
        assert rows(postgresql_url, found) == [("accounts",), ("accounts",)]


@pytest.mark.parametrize("as_dict", [True, False])
def test_keeps_users_in_another_bind(
    clerk: FakeClerk, make_database: MakeDatabase, as_dict: bool
) -> None:
    """``__bind_key__`` selects the database of clerkhooks' tables, but not of other tables."""
    db, main, people = make_db(), make_database("sqlite"), make_database("postgresql")

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "people"

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    bind = people.replace("postgresql://", "postgresql+psycopg://", 1)
    binds = {"people": {"url": bind, "pool_size": 1} if as_dict else bind}
    app, hooks = Flask(__name__), ClerkHooks(db, User)
    app.config.update(configuration(clerk, main, SQLALCHEMY_BINDS=binds))
    db.init_app(app)
    hooks.init_app(app)

    @hooks.on("user.created")
    def note(event: Any) -> None:
        user = db.session.get_one(User, event.data["id"])
        db.session.add(Note(text=user.name))

    with tables(app):
        check_users_stay_correct(app, clerk)
        ClerkService(app, clerk).sign_up(first_name="Grace")
        assert ("Grace Lovelace",) in rows(main, "SELECT text FROM note")
        assert ("Grace Lovelace",) in rows(people, "SELECT name FROM users")
        names = "SELECT name FROM sqlite_master WHERE type = 'table'"
        assert rows(main, names) == [("note",)]


def test_uses_the_engine_options_of_the_constructor(clerk: FakeClerk, postgresql_url: str) -> None:
    """``SQLAlchemy(engine_options=…)`` also applies to the private engine."""
    made: list[Any] = []

    def connect() -> Any:
        made.append(psycopg.connect(postgresql_url))
        return made[-1]

    # Only ``creator`` can connect, as with a cloud connector. The URL's host does not exist.
    db = SQLAlchemy(engine_options={"creator": connect})
    app = create_app(clerk, "postgresql://nowhere.invalid/none", db)
    with tables(app):
        check_users_stay_correct(app, clerk)
        assert len(made) >= 2

    db = SQLAlchemy(engine_options={"connect_args": {"application_name": "shop"}})
    app = create_app(clerk, postgresql_url, db)
    with tables(app):
        check_users_stay_correct(app, clerk)
        query = sa.text("SELECT current_setting('application_name')")
        database = app.extensions["clerkhooks"].store.database
        assert database.execute(query) == [("shop",)]


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "SERIALIZABLE"},
        {"isolation_level": "AUTOCOMMIT"},
        {"poolclass": NullPool},
        {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1, "pool_pre_ping": True},
        {"execution_options": {"schema_translate_map": {None: None}}, "echo": False},
        {"pool_recycle": 1, "pool_reset_on_return": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_works_with_every_engine_option(
    clerk: FakeClerk, url: str, options: dict[str, Any]
) -> None:
    """The users table stays correct whichever engine options the application sets."""
    app = create_app(clerk, url, make_db(), SQLALCHEMY_ENGINE_OPTIONS=options)
    with tables(app):
        check_users_stay_correct(app, clerk)


def use_serializable(db: SQLAlchemy) -> None:
    """Read with a stricter isolation level."""
    db.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    db.session.execute(sa.text("SELECT 1"))


def use_autocommit(db: SQLAlchemy) -> None:
    """Run a statement that is not allowed in a transaction."""
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM"))


def use_session_settings(db: SQLAlchemy) -> None:
    """Leave session settings on the pooled connection."""
    if db.engine.dialect.name == "postgresql":
        for setting in ("TIME ZONE 'Asia/Tokyo'", "default_transaction_read_only = on"):
            db.session.execute(sa.text(f"SET SESSION {setting}"))
    else:
        db.session.execute(sa.text("PRAGMA query_only = 1"))
    db.session.commit()


def leave_a_transaction_open(db: SQLAlchemy) -> None:
    """Read in a transaction that stays open until the request ends."""
    db.session.execute(sa.text("SELECT count(*) FROM users"))


@pytest.mark.parametrize(
    "use", [use_serializable, use_autocommit, use_session_settings, leave_a_transaction_open]
)
def test_commits_every_delivery_despite_changed_connections(
    clerk: FakeClerk, url: str, use: Callable[[SQLAlchemy], None]
) -> None:
    """Deliveries are committed with UTC times even if views change the pooled connections."""
    db = make_db()
    pool = {"pool_size": 1, "max_overflow": 0}
    app = create_app(clerk, url, db, SQLALCHEMY_ENGINE_OPTIONS=pool)

    @app.get("/use")
    def view() -> str:
        use(db)
        return "used"

    with tables(app):
        service = ClerkService(app, clerk)
        for number in range(5):
            assert service.http.get("/use").text == "used"
            body = user_event(f"user_{number}")
            assert service.deliver_body(body).get_json()["outcome"] == "applied"
            assert (
                service.client(f"user_{number}").get("/api/me").get_json()["name"] == "Ada Lovelace"
            )
        # A separate connection sees only committed rows.
        assert rows(url, "SELECT count(*) FROM users") == [(5,)]
        assert rows(url, "SELECT count(*) FROM webhook_messages") == [(5,)]
        service.http.get("/use")
        last_seen = service.client("user_1").get("/api/me").get_json()["lastSeen"]
        seen = datetime.fromisoformat(last_seen)
        assert last_seen.endswith("Z")
        assert abs(datetime.now(UTC) - seen) < timedelta(minutes=1)
        column = "occurred_at AT TIME ZONE 'UTC'" if url.startswith("postgresql") else "occurred_at"
        [(occurred_at,)] = rows(url, f"SELECT {column} FROM webhook_messages LIMIT 1")
        moment = datetime.fromisoformat(str(occurred_at)).replace(tzinfo=UTC)
        assert abs(moment.timestamp() * 1000 - NOW_MS) < 2


def test_limits_only_its_own_statements(clerk: FakeClerk, postgresql_url: str) -> None:
    """An application's query may take longer than clerkhooks' statement timeout."""
    db = make_db()
    app = create_app(clerk, postgresql_url, db)

    @app.get("/report")
    @require_auth
    def report() -> dict[str, object]:
        db.session.execute(sa.text("SELECT pg_sleep(4.2)"))
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        query = sa.select(*(sa.func.current_setting(name) for name in names))
        return {"id": current_user.id, "limits": list(db.session.execute(query).one())}

    with tables(app):
        service = ClerkService(app, clerk)
        user_id = service.sign_up()
        answer = service.client(user_id).get("/report").get_json()
    assert answer == {"id": user_id, "limits": ["0", "0", "0"]}


def test_keeps_working_while_a_view_holds_every_connection(clerk: FakeClerk, url: str) -> None:
    """Deliveries and calls succeed while views hold all connections of the application's pool."""
    db = make_db()
    pool = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 20}
    app = create_app(clerk, url, db, SQLALCHEMY_ENGINE_OPTIONS=pool)
    holding, release = threading.Barrier(3), threading.Event()

    @app.get("/hold")
    @require_auth
    def hold() -> str:
        db.session.execute(sa.text("SELECT count(*) FROM users"))
        holding.wait(10)
        release.wait(20)
        return current_user.id

    with tables(app):
        service = ClerkService(app, clerk)
        ada = service.sign_up()
        with ThreadPool(2) as threads:
            waiting = [threads.submit(service.client(ada).get, "/hold") for _ in range(2)]
            holding.wait(10)
            try:
                check_users_stay_correct(app, clerk)
            finally:
                release.set()
            assert [answer.result(20).text for answer in waiting] == [ada, ada]


def test_resolves_a_relative_path_in_the_instance_folder(clerk: FakeClerk, tmp_path: Path) -> None:
    """Both engines resolve ``sqlite:///shop.db`` to the same file in the instance folder."""
    db = make_db()
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    app.config.update(configuration(clerk, "sqlite:///shop.db"))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    with tables(app):
        check_users_stay_correct(app, clerk)
        file = sqlite3.connect(tmp_path / "instance" / "shop.db")
        assert file.execute("SELECT count(*) FROM users").fetchone() == (2,)
        file.close()
    assert list(tmp_path.rglob("*.db")) == [tmp_path / "instance" / "shop.db"]


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE", None])
@pytest.mark.parametrize("reads_before", [True, False])
def test_writes_messages_with_handlers_atomically(
    clerk: FakeClerk, url: str, level: str | None, reads_before: bool
) -> None:
    """A failing handler rolls back the whole message, even with an engine in AUTOCOMMIT."""
    db = make_db()

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[str] = mapped_column(primary_key=True)

    app, hooks, failing = Flask(__name__), ClerkHooks(db), [True]
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
    options |= {} if level is None else {"isolation_level": level}
    app.config.update(configuration(clerk, url, SQLALCHEMY_ENGINE_OPTIONS=options))
    db.init_app(app)
    hooks.init_app(app)
    levels: list[str] = []

    @app.before_request
    def read() -> None:
        if reads_before:
            db.session.scalars(sa.select(Note)).all()
            levels.append(db.session.connection().get_isolation_level())

    @hooks.on("user.created")
    def note(event: Event) -> None:
        db.session.add(Note(id=event.data["id"]))
        db.session.flush()
        if failing:
            raise LookupError

    with tables(app):
        service = ClerkService(app, clerk)
        body = user_event("user_1", "user.created")
        assert service.deliver_body(body, "msg_1").status_code == 500
        assert rows(url, "SELECT id FROM users UNION SELECT id FROM note") == []
        failing.clear()
        assert service.deliver_body(body, "msg_1").get_json()["outcome"] == "applied"
        assert service.deliver_body(body, "msg_1").get_json()["outcome"] == "duplicate"
        assert (
            rows(url, "SELECT id FROM note") == rows(url, "SELECT id FROM users") == [("user_1",)]
        )
        # The application's engine is unchanged.
        assert len(set(levels)) <= 1
        check_users_stay_correct(app, clerk)


def test_supports_models_with_subclasses(clerk: FakeClerk, url: str) -> None:
    """Inheritance, relationships, hybrids and deferred columns work as with any model."""
    db = make_db()

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        kind: Mapped[str] = mapped_column(server_default="user")
        notes: Mapped[str | None] = mapped_column(deferred=True)
        upper: Mapped[str] = mapped_column(sa.Computed("upper(name)"))
        teams: Mapped[list[Any]] = relationship("Team", secondary="members")
        __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "user"}

        @hybrid_property
        def label(self) -> str:
            return f"{self.name} ({self.kind})"

    class Admin(User):
        level: Mapped[int | None]
        __mapper_args__: ClassVar = {"polymorphic_identity": "admin"}

    class Team(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    db.Table(
        "members",
        sa.Column("user_id", sa.ForeignKey("users.id")),
        sa.Column("team_id", sa.ForeignKey("team.id")),
    )
    app = create_app(clerk, url, db, User)

    @app.get("/label")
    @require_auth
    def label() -> list[Any]:
        user = db.session.get_one(User, current_user.id)
        return [cast("Any", current_user).label, type(user).__name__, len(user.teams)]

    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        user_id = service.sign_up()
        assert service.client(user_id).get("/label").get_json() == [
            "Ada Lovelace (user)",
            "User",
            0,
        ]
        rows(url, f"UPDATE users SET kind = 'admin' WHERE id = '{user_id}'")
        answer = service.client(user_id).get("/label").get_json()
        assert answer == ["Ada Lovelace (admin)", "Admin", 0]


def test_leaves_nothing_to_migrate_under_any_comparison(clerk: FakeClerk, url: str) -> None:
    """Alembic finds no difference from the metadata, even with all comparisons enabled."""
    db = make_db()

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        plan: Mapped[str] = mapped_column(server_default="free")
        tier: Mapped[str | None] = from_clerk("public_metadata.tier", sa.String(20), index=True)
        score: Mapped[float | None] = from_clerk("public_metadata.score")

    app, hooks = Flask(__name__), ClerkHooks(db, User)
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    hooks.init_app(app)
    rows(url, "CREATE TABLE invoices (number integer PRIMARY KEY)")
    options = {"compare_type": True, "compare_server_default": True, "include_schemas": True}
    with tables(app), app.app_context(), db.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts=options | {"include_name": hooks.include_name}
        )
        assert compare_metadata(context, db.metadata) == []
        rows(url, "DROP TABLE webhook_messages")
        [change, *indexes] = compare_metadata(context, db.metadata)
        assert (change[0], change[1].name) == ("add_table", "webhook_messages")
        assert {index[0] for index in indexes} <= {"add_index"}
