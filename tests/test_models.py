"""User models, and ``upsert``, the version-checked write for an application's own tables."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, mapped_column
from sqlalchemy.schema import CreateTable

from clerkhooks import ClerkHooks, ClerkUser, Event, Versioned, upsert
from clerkhooks.clerk.fake import FakeClerk, event_body
from clerkhooks.web.state import disconnect
from tests.application import Application
from tests.conftest import MakeDatabase
from tests.racing import delivery, outcomes, run_contending
from tests.support import NOW_MS, TABLES, Service, user_event

pytest_plugins = ["tests.application"]


@pytest.mark.parametrize(("own", "fillfactor"), [({}, 90), ({"fillfactor": 70}, 70)])
def test_leaves_space_in_the_pages_of_postgresql(own: dict[str, int], fillfactor: int) -> None:
    """A tenth of each page is free for new versions of rows, unless the model decides."""

    class Base(DeclarativeBase):
        """The application's declarative base."""

    db = SQLAlchemy(model_class=Base)
    arguments = {"__table_args__": {"postgresql_with": own}} if own else {}
    ClerkHooks(db, type("User", (ClerkUser, db.Model), arguments))
    statement = CreateTable(db.metadata.tables["users"]).compile(
        dialect=sa.create_engine("postgresql+psycopg://").dialect
    )
    assert str(statement).rstrip().endswith(f"WITH (fillfactor = {fillfactor})")


def test_makes_a_plain_table_of_users(clerk: FakeClerk, make_database: MakeDatabase) -> None:
    """Without a model, ``ClerkHooks`` declares a ``users`` table with the standard columns."""
    db, app, url = SQLAlchemy(), Flask("plain"), make_database("sqlite")
    hooks = ClerkHooks(db)
    app.config.update(clerk.environ, SQLALCHEMY_DATABASE_URI=url)
    db.init_app(app)
    hooks.init_app(app)
    with app.app_context():
        db.create_all()
    service = Service(app, clerk, url)
    assert service.outcome(user_event("user_1")) == "applied"
    assert service.call("user_1").get_json()["name"] == "Ada Lovelace"
    assert set(db.metadata.tables) == set(TABLES)
    disconnect(app)


def declare(db: SQLAlchemy, name: str = "User", **attributes: Any) -> type[Any]:
    """Declare a user model."""
    parents: tuple[Any, ...] = (ClerkUser, db.Model)
    return type(name, parents, {"__module__": __name__, **attributes})


def test_refuses_a_model_without_the_mixin() -> None:
    """A model must derive from ``ClerkUser``, which has the columns that clerkhooks writes."""
    db = SQLAlchemy()
    table: Any = type(
        "Team",
        (db.Model,),
        {"__module__": __name__, "id": mapped_column(sa.Text, primary_key=True)},
    )
    models: list[Any] = [table, "User", ClerkUser()]
    for model in models:
        with pytest.raises(TypeError, match="must derive from ClerkUser"):
            ClerkHooks(db, model)


def test_refuses_a_table_that_is_already_declared() -> None:
    """The error says to derive the model from ``ClerkUser`` or to use only one ``ClerkHooks``."""
    db = SQLAlchemy()
    model = declare(db)
    with pytest.raises(ValueError, match="Derive its model from ClerkUser"):
        ClerkHooks(db)
    ClerkHooks(db, model)
    with pytest.raises(ValueError, match="Use one ClerkHooks for each SQLAlchemy object"):
        ClerkHooks(db, declare(db, "Other", __tablename__="others"))


def test_refuses_an_application_that_is_not_ready(application: Application) -> None:
    """``hooks.init_app`` must be called after ``db.init_app``, once per application."""
    with pytest.raises(RuntimeError, match=r"Call db.init_app\(app\) before"):
        application.hooks.init_app(Flask("second"))
    with pytest.raises(RuntimeError, match="already called"):
        application.hooks.init_app(application.app)


@pytest.fixture
def teams(application: Application) -> type[Any]:
    """
    A model that the application defines, with a composite key.

    The attribute for the column ``name`` is called ``title``.
    """
    attributes = {
        "__module__": __name__,
        "__tablename__": "teams",
        "tenant": mapped_column(sa.Text, primary_key=True),
        "id": mapped_column(sa.Text, primary_key=True),
        "title": mapped_column("name", sa.Text),
        "note": mapped_column(sa.Text),
    }
    parents: tuple[Any, ...] = (Versioned, application.db.Model)
    model = type("Team", parents, attributes)
    application.create_all()

    @application.hooks.on("organization.*")
    def keep(event: Event) -> None:
        values = {"tenant": "t", "id": event.data["id"], "title": event.data.get("name")}
        written.append(upsert(model, event, **values))

    written.clear()
    return model


written: list[bool] = []
TEAMS = "SELECT tenant, id, name, note, version_updated_at FROM teams"


def team(at: int, name: str | None, **data: Any) -> bytes:
    """Return an ``organization.updated`` event."""
    whole = {"id": "org_1", "name": name, "updated_at": NOW_MS + at} | data
    return event_body("organization.updated", whole, NOW_MS + at)


@pytest.mark.usefixtures("teams")
def test_ends_with_the_newest_version(application: Application) -> None:
    """
    The newest version wins, whatever the order of the events.

    ``upsert`` returns whether it wrote the row, and leaves other columns unchanged.
    """
    events = {at: team(at, f"Name {at}") for at in (1, 2, 3)}
    for order in permutations(events):
        application.rows("DELETE FROM teams")
        written.clear()
        for number, at in enumerate(order):
            assert application.outcome(events[at]) == "applied"
            assert written[-1] is (at == max(order[: number + 1]))
            application.rows("UPDATE teams SET note = 'own'")
        assert application.rows(TEAMS) == [("t", "org_1", "Name 3", "own", NOW_MS + 3)]


@pytest.mark.usefixtures("teams")
def test_fills_a_row_without_a_version(application: Application) -> None:
    """A row that the application inserted accepts the first event, even an old one."""
    application.rows("INSERT INTO teams (tenant, id, name) VALUES ('t', 'org_1', 'Own')")
    assert application.outcome(event_body("organization.created", {"id": "org_1"}, 0)) == "applied"
    assert application.rows(TEAMS) == [("t", "org_1", None, None, 0)]
    assert written == [True]


@pytest.mark.usefixtures("teams")
@pytest.mark.parametrize("newer_first", [False, True], ids=["older first", "newer first"])
def test_lets_the_newer_of_two_writes_win(application: Application, newer_first: bool) -> None:
    """If two concurrent events create a row, one waits for the other, and the newer one wins."""
    acts = [delivery(application, team(1, "Older")), delivery(application, team(2, "Newer"))]
    first, second = reversed(acts) if newer_first else acts
    assert outcomes(run_contending(application, first, second)) == ["applied", "applied"]
    assert application.rows(TEAMS) == [("t", "org_1", "Newer", None, NOW_MS + 2)]
    assert written == [True, not newer_first]


def test_refuses_a_write_that_cannot_be_guarded(application: Application, teams: Any) -> None:
    """
    An unversioned model, an incomplete key or an unknown column raises an error.

    The response to the delivery is 500.
    """
    errors: list[Exception] = []

    @application.hooks.on("session.*")
    def keep(event: Event) -> None:
        calls: list[tuple[Any, dict[str, str | None]]] = [
            (application.db.Model, {"id": "1"}),
            ("teams", {"id": "1"}),
            (teams, {"id": "1"}),
            (teams, {"tenant": "t", "id": None}),
            (teams, {"tenant": "t", "id": "1", "colour": "red"}),
        ]
        for model, values in calls:
            try:
                upsert(model, event, **values)
            except (TypeError, ValueError) as error:
                errors.append(error)
        raise errors[0]

    assert application.deliver(event_body("session.created", {}, NOW_MS)).status_code == 500
    assert [type(error) for error in errors] == [TypeError] * 2 + [ValueError] * 3
    assert "derives from Versioned" in str(errors[0])
    assert "primary key: tenant" in str(errors[2])
    assert "primary key: id" in str(errors[3])
    assert "no column colour" in str(errors[4])
