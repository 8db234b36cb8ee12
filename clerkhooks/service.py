"""The service: a Flask application with only clerkhooks, configured by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from flask import Flask, Request
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase
from werkzeug.routing import MapAdapter

from clerkhooks import ClerkHooks, SettingsError
from clerkhooks.errors import Fault
from clerkhooks.settings import (
    DEFAULT_DATABASE_URL,
    PROJECT,
    VARIABLES,
    VERSION_TABLE,
    ServiceSettings,
    exit_if_invalid,
    read_environ,
)

ROUTES: Final = ("webhooks", "me", "health", "metrics", "console", "changes")


class Base(DeclarativeBase):
    """The service's declarative base. It gives constraints the names that migrations use."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)
hooks = ClerkHooks(db)


class Service(Flask):
    """A Flask application that does not parse the Host header of each request."""

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match only the path, because no route depends on the Host header."""
        if request is None:
            return super().create_url_adapter(None)
        script, path = request.root_path, request.path
        return self.url_map.bind("", script, path_info=path, default_method=request.method)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """
    Create the service from *config*, by default from the environment and ``.env``.

    Raises:
        SettingsError: *config* is invalid.
        SystemExit: the environment is invalid. A message is printed, and the exit status is 2.
    """
    if config is None:
        with exit_if_invalid():
            return create_app(read_environ())
    settings = ServiceSettings.from_mapping(config)
    app = Service("clerkhooks")
    app.config.update({name: config[name] for name in VARIABLES if name in config})
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
    app.config["DATABASE_POOL_SIZE"] = settings.pool_size
    if settings.pooler == "transaction":  # for flask db upgrade, which uses this engine
        options = {"connect_args": {"prepare_threshold": None}}
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
    app.url_map.merge_slashes = False  # Svix counts a redirect as a failure
    _check_sqlite_folder(app, sa.make_url(settings.database_url))
    db.init_app(app)
    migrations = str(PROJECT / "migrations")
    Migrate(app, db, migrations, version_table=VERSION_TABLE, include_name=hooks.include_name)
    hooks.init_app(app, routes=ROUTES, problems=True, request_log=settings.log_format, environ={})
    return app


def _check_sqlite_folder(app: Flask, url: sa.URL) -> None:
    """
    Check that a SQLite file's folder is writable. Create the instance folder if needed.

    Raises:
        SettingsError: the folder is not writable.
    """
    if url.get_backend_name() != "sqlite" or str(url.database).startswith("file:"):
        return
    folder = Path(app.instance_path, str(url.database)).parent
    if folder == Path(app.instance_path):
        with suppress(OSError):  # the check below reports the problem
            folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        is_default = str(url) == DEFAULT_DATABASE_URL
        what = "is not set, and its default is" if is_default else "is"
        problem = f"{what} a SQLite file in {folder}, where this user cannot write."
        remedy = "Use another file, such as sqlite:////path/to/clerkhooks.db, or use PostgreSQL."
        raise SettingsError([Fault("DATABASE_URL", problem, remedy)])
