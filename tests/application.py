"""
An application that uses ``ClerkHooks``, and fixtures for the extension's tests.

A test module enables the fixtures with ``pytest_plugins = ["tests.application"]``.
PYTEST_DONT_REWRITE: a test module may import from here before pytest loads the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from clerkhooks import ClerkHooks, ClerkOrganization, ClerkUser
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.store.database import Database
from clerkhooks.web.state import State, disconnect
from tests.conftest import KINDS, MakeDatabase
from tests.support import Service


class Application(Service):
    """A Flask application with its database and a fake Clerk."""

    def __init__(
        self,
        clerk: FakeClerk,
        database_url: str,
        columns: Mapping[str, Any] | None = None,
        organization: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        """
        Create the application. *columns* are added to its user model.

        With *organization*, it has a model of organizations with these columns.
        """

        class Base(DeclarativeBase):
            """The application's declarative base."""

        self.db = SQLAlchemy(model_class=Base)
        parents: tuple[Any, ...] = (ClerkUser, self.db.Model)
        self.model: Any = type("User", parents, {"__module__": __name__, **(columns or {})})
        own: Any = organization and type(
            "Organization", (ClerkOrganization, self.db.Model), dict(organization)
        )
        self.hooks: ClerkHooks[Any] = ClerkHooks(self.db, self.model, organization_model=own)
        super().__init__(self.create_app(clerk, database_url, **config), clerk, database_url)

    def create_app(self, clerk: FakeClerk, database_url: str, **config: Any) -> Flask:
        """Create a Flask application that uses *database_url*. May be called several times."""
        app = Flask("application")
        uri = database_url.replace("postgresql://", "postgresql+psycopg://", 1)
        app.config.update(clerk.environ, SQLALCHEMY_DATABASE_URI=uri)
        app.config.update(config)
        self.db.init_app(app)
        self.hooks.init_app(app)
        return app

    @property
    def state(self) -> State:
        """The application's clerkhooks state."""
        state: State = self.app.extensions["clerkhooks"]
        return state

    @property
    def database(self) -> Database:
        """The ``Database`` of clerkhooks' private engine."""
        return self.state.store.database

    def create_all(self) -> None:
        """Create missing tables."""
        with self.app.app_context():
            self.db.create_all()


MakeApplication = Callable[..., Application]


@pytest.fixture(params=KINDS)
def empty_database(request: pytest.FixtureRequest, emptied_database: MakeDatabase) -> str:
    """Return the URL of an empty database. The test runs once for each kind of database."""
    return emptied_database(request.param)


@pytest.fixture
def make_application(clerk: FakeClerk) -> Iterator[MakeApplication]:
    """Create applications and their tables; close the connections after the test."""
    made: list[Application] = []

    def make(
        url: str,
        columns: Mapping[str, Any] | None = None,
        organization: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> Application:
        application = Application(clerk, url, columns, organization, **config)
        made.append(application)
        application.create_all()
        return application

    yield make
    for application in made:
        disconnect(application.app)


@pytest.fixture
def application(make_application: MakeApplication, empty_database: str) -> Application:
    """Create an application without additional columns."""
    return make_application(empty_database)
