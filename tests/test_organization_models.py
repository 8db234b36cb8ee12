"""The models of organizations and memberships in an application."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import ClerkHooks, ClerkOrganization, ClerkUser, SettingsError, from_clerk
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from tests.application import Application, MakeApplication
from tests.support import NOW_MS, TABLES, membership_event, organization_event

pytest_plugins = ["tests.application"]


def make_db() -> Any:
    """Return a new Flask-SQLAlchemy object."""

    class Base(DeclarativeBase):
        """The declarative base."""

    return SQLAlchemy(model_class=Base)


def test_keeps_declared_columns(make_application: MakeApplication, empty_database: str) -> None:
    """They are versioned and erased like the other columns. The application's own are not."""
    columns = {
        "__tablename__": "companies",
        "plan": from_clerk("public_metadata.plan", sa.Text),
        "note": mapped_column(sa.Text, server_default="none"),
    }
    application = make_application(empty_database, organization=columns)
    organization_id = clerk_id("org")
    query = "SELECT name, plan, note FROM companies"
    for at, plan in ((2, "pro"), (1, "free")):
        metadata = {"plan": plan}
        application.outcome(
            organization_event(organization_id, at=NOW_MS + at, public_metadata=metadata)
        )
    assert application.rows(query) == [("Acme", "pro", "none")]
    application.outcome(organization_event(organization_id, "deleted"))
    assert application.rows(query) == [("Deleted Organization", None, "none")]


def test_offers_the_models(make_application: MakeApplication, empty_database: str) -> None:
    """An application can join its own tables with those of organizations and memberships."""
    application = make_application(empty_database, CLERK_TABLES="organizations")
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    application.outcome(organization_event(ids[1]))
    application.outcome(membership_event(ids))
    organization, membership = (
        application.hooks.organization_model,
        application.hooks.membership_model,
    )
    query = sa.select(organization.name, membership.role).join(
        membership, membership.organization_id == organization.id
    )
    with application.app.app_context():
        assert application.db.session.execute(query).all() == [("Acme", "org:member")]


def test_has_no_tables_by_default(application: Application) -> None:
    """Without CLERK_TABLES, the tables are not in the metadata, so migrations ignore them."""
    assert set(application.db.metadata.tables) == set(TABLES)
    for name in ("organization_model", "membership_model"):
        with pytest.raises(RuntimeError, match=r"CLERK_TABLES.* after hooks.init_app"):
            getattr(application.hooks, name)


def test_stores_organizations_where_they_are_configured(
    make_application: MakeApplication, clerk: FakeClerk, empty_database: str
) -> None:
    """Two applications of one ``ClerkHooks`` may have different tables."""
    application = make_application(empty_database, CLERK_TABLES="organizations")
    other = application.create_app(clerk, empty_database)
    assert application.state.store.endings is not None
    assert other.extensions["clerkhooks"].store.endings is None


def test_uses_the_database_of_users(clerk: FakeClerk) -> None:
    """With a bind key or a schema, the tables are where the users are."""
    db = make_db()

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        """A user in another database."""

        __bind_key__ = "other"
        __table_args__ = {"schema": "clerk"}  # noqa: RUF012

    hooks = ClerkHooks(db, User)
    app = Flask(__name__)
    binds = {"other": "postgresql+psycopg://localhost/other"}
    app.config.update(clerk.environ, CLERK_TABLES="organizations", SQLALCHEMY_BINDS=binds)
    db.init_app(app)
    hooks.init_app(app)
    assert set(db.metadatas["other"].tables) == {
        f"clerk.{name}" for name in (*TABLES, "organizations", "organization_memberships")
    }


def test_refuses_other_models() -> None:
    """A model must derive from ClerkOrganization, and be in the database of the users."""
    db = make_db()
    with pytest.raises(TypeError, match="derive from ClerkOrganization"):
        ClerkHooks(db, organization_model=int)  # type: ignore[arg-type]

    db = make_db()

    class Elsewhere(ClerkOrganization, db.Model):  # type: ignore[name-defined, misc]
        """An organization in another database."""

        __bind_key__ = "other"

    with pytest.raises(ValueError, match="same database"):
        ClerkHooks(db, organization_model=Elsewhere)


def test_refuses_columns_without_a_value() -> None:
    """Declared columns of organizations follow the rules of those of users."""
    db = make_db()

    class Organization(ClerkOrganization, db.Model):  # type: ignore[name-defined, misc]
        """An organization with a column that clerkhooks cannot fill."""

        rank: Mapped[int]

    with pytest.raises(ValueError, match="when clerkhooks inserts an organization"):
        ClerkHooks(db, organization_model=Organization)


@pytest.mark.parametrize("name", ["organizations", "organization_memberships"])
def test_refuses_a_name_in_use(clerk: FakeClerk, empty_database: str, name: str) -> None:
    """A table of the application's own is not used for Clerk's organizations."""
    db = make_db()
    type(
        "Own", (db.Model,), {"__tablename__": name, "id": mapped_column(sa.Text, primary_key=True)}
    )
    hooks, app = ClerkHooks(db), Flask(__name__)
    app.config.update(clerk.environ, CLERK_TABLES="organizations")
    app.config["SQLALCHEMY_DATABASE_URI"] = empty_database
    db.init_app(app)
    with pytest.raises(ValueError, match=f"'{name}' already exists"):
        hooks.init_app(app)


def test_refuses_unknown_tables(make_application: MakeApplication, empty_database: str) -> None:
    """CLERK_TABLES must contain names of optional tables."""
    with pytest.raises(SettingsError, match="CLERK_TABLES must be organizations"):
        make_application(empty_database, CLERK_TABLES="organisations")
