"""``ClerkHooks``, the extension's public class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import sqlalchemy as sa
from flask import Flask, request_started
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapper
from werkzeug.exceptions import HTTPException

from clerkhooks.clerk.session_tokens import Session
from clerkhooks.clerk.signatures import SigningSecret
from clerkhooks.cli.commands import clerk
from clerkhooks.deliveries import Deliveries
from clerkhooks.errors import RequestError
from clerkhooks.events import Handler, Handlers
from clerkhooks.organization_models import OrganizationModels, make_organization_models
from clerkhooks.routes import DEFAULT_ROUTES, make_blueprint, parse_routes
from clerkhooks.settings import Settings, merge_config
from clerkhooks.store import OrganizationTables, Store, make_own_tables
from clerkhooks.store.changes import make_changes_table
from clerkhooks.store.database import Database, merge_engine_options
from clerkhooks.store.models import (
    ClerkMembership,
    ClerkOrganization,
    ClerkUser,
    complete_table,
    declared_fields,
)
from clerkhooks.users import Users
from clerkhooks.web import auth
from clerkhooks.web.logs import init_request_log
from clerkhooks.web.problems import from_http_exception, from_request_error
from clerkhooks.web.state import EXTENSION, RequestLog, State

if TYPE_CHECKING:
    from clerkhooks.payloads import On

U = TypeVar("U", bound=ClerkUser)
H = TypeVar("H", bound=Handler)


class ClerkHooks(Generic[U]):
    """
    Keeps a table of users in sync with Clerk, and authenticates an application's callers.

    *db* is the application's Flask-SQLAlchemy object. *model* derives from ``ClerkUser`` and
    ``db.Model``. By default, it is a plain model with the table ``users``. One object can serve any
    number of applications::

        hooks = ClerkHooks(db, User)
        hooks.init_app(app)

    Organizations and memberships are also stored if ``CLERK_TABLES`` is ``organizations``, or if
    *organization_model* is passed. It derives from ``ClerkOrganization`` and ``db.Model``.

    Raises:
        ValueError: a column of a model is declared incorrectly, or a table's name is in use.
        TypeError: *model* does not derive from ``ClerkUser``, or *organization_model* does not
            derive from ``ClerkOrganization``.
    """

    @overload
    def __init__(
        self: ClerkHooks[ClerkUser],
        db: SQLAlchemy,
        *,
        organization_model: type[ClerkOrganization] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        db: SQLAlchemy,
        model: type[U],
        *,
        organization_model: type[ClerkOrganization] | None = None,
    ) -> None: ...
    def __init__(
        self,
        db: SQLAlchemy,
        model: type[Any] | None = None,
        *,
        organization_model: type[Any] | None = None,
    ) -> None:
        """Add the tables to the metadata of *db*."""
        if model is not None and not (isinstance(model, type) and issubclass(model, ClerkUser)):
            raise TypeError("The model must derive from ClerkUser: class User(ClerkUser, db.Model)")
        self.db = db
        self.model: type[U] = cast("type[U]", model or _make_model(db))
        """The user model, which is *model* or the plain one."""
        mapper: Mapper[Any] = sa.inspect(self.model)
        self._mapper, self._users = mapper, cast("sa.Table", mapper.local_table)
        self._fields = declared_fields(mapper)
        self._handlers = Handlers()
        complete_table(self._users)
        self._own = make_own_tables(self._users.metadata, self._users.schema)
        self._stores_organizations = organization_model is not None
        self._organizations: OrganizationModels | None = None
        self._changes: sa.Table | None = None
        if organization_model is not None:
            self._organizations = make_organization_models(db, self._users, organization_model)

    def init_app(
        self,
        app: Flask,
        *,
        routes: Iterable[str] = DEFAULT_ROUTES,
        url_prefix: str | None = None,
        problems: bool = False,
        request_log: RequestLog | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """
        Register routes, commands and error handling on *app*, after ``db.init_app(app)``.

        *routes* may contain ``webhooks``, ``me``, ``health``, ``metrics``, ``console`` and
        ``changes``. *url_prefix* is added to all of them. With *problems*, every HTTP error of the
        application becomes ``application/problem+json``. *request_log* logs each request to stdout,
        as ``json`` or as ``text``; ``auto`` means text on a terminal and JSON elsewhere. By
        default, only deliveries and failures are logged, to the logger ``clerkhooks``. A variable
        that is not in ``app.config`` is read from *environ*, by default ``os.environ``. Nothing
        else in the application is changed.

        Raises:
            SettingsError: the configuration in ``app.config`` and the environment is invalid.
            RuntimeError: ``db.init_app(app)`` was not called, or *app* already uses clerkhooks.
            ValueError: *routes* contains an unknown name, or the name of an optional table is in
                use.
        """
        wanted = parse_routes(routes)
        self._check_app(app)
        values = merge_config(app.config, os.environ if environ is None else environ)
        settings = Settings.from_mapping(values)
        state = app.extensions[EXTENSION] = self._make_state(app, settings, values)
        app.register_error_handler(RequestError, from_request_error)  # used by require_auth
        if problems:
            app.register_error_handler(HTTPException, from_http_exception)
        if request_log is not None:
            init_request_log(app, request_log)
        blueprint = make_blueprint(app, state, wanted)
        app.register_blueprint(blueprint, url_prefix=url_prefix)
        app.cli.add_command(clerk)
        auth.refuse_unprotected(app)
        request_started.connect(auth.refuse_unprotected, app)  # for views registered later

    @property
    def on(self) -> On:
        """
        Register a handler for an event type, a family such as ``organization.*``, or ``*``.

        Use it as ``@hooks.on("user.created")`` or ``@hooks.on("user.created", after_commit=True)``.
        The handler takes one ``Event``; ``clerkhooks.payloads`` contains the types of its data. It
        runs inside the message's transaction, once for each message, including stale ones. Its
        writes through ``db.session`` are committed with the message. If the handler raises an
        exception or ends the transaction, the response is 500, and Svix retries the message. With
        *after_commit*, the handler runs after the commit, at most once, and its errors are only
        logged.

        With *durable*, the handler is called for changes of users, organizations and memberships,
        whatever made them, at least once and in order, outside of any transaction. Its position in
        the change feed is stored under *name*, by default the name of the function. A new handler
        begins with changes from now on or, with *from_start*, with the oldest change that is kept.

        Raises:
            ValueError: *pattern* is malformed, no change has such a type, the options contradict
                each other, or another durable handler has the same name.
            TypeError: the handler is not a plain function.
            SettingsError: an application of this object has no change feed for durable handlers.
        """
        return self._on

    def _on(
        self,
        pattern: str,
        *,
        after_commit: bool = False,
        durable: bool = False,
        name: str | None = None,
        from_start: bool = False,
    ) -> Callable[[H], H]:
        if (durable and after_commit) or ((name or from_start) and not durable):
            raise ValueError("Use durable=True without after_commit; name and from_start need it.")

        def register(handler: H) -> H:
            if durable:
                self._handlers.add_durable(pattern, handler, name, from_start=from_start)
            else:
                self._handlers.add(pattern, handler, after_commit=after_commit)
            return handler

        return register

    @property
    def current_user(self) -> U:
        """A frozen copy of the current caller's row, for views with ``require_auth``."""
        return cast("U", auth.get_user())

    @property
    def optional_user(self) -> U | None:
        """A frozen copy of the current caller's row, or None if the caller is anonymous."""
        return cast("U | None", auth.get_user())

    @property
    def optional_session(self) -> Session | None:
        """The session of the current caller, or None if the caller is anonymous."""
        return cast("Session | None", auth.get_session())

    @property
    def organization_model(self) -> type[ClerkOrganization]:
        """The model of organizations: the one that was passed, or the plain one."""
        return self._get_organization_models().organization

    @property
    def membership_model(self) -> type[ClerkMembership]:
        """The model of memberships."""
        return self._get_organization_models().membership

    def include_name(self, name: str | None, type_: str, parent_names: Any) -> bool:
        """
        Restrict ``flask db migrate`` to the tables of *db* in a shared database.

        Use it as ``Migrate(app, db, include_name=hooks.include_name)``. Without it, the generated
        migration drops every table that is not in the metadata.
        """
        if type_ != "table":
            return True
        schema = parent_names.get("schema_name")
        key = name if schema is None else f"{schema}.{name}"
        return any(key in metadata.tables for metadata in self.db.metadatas.values())

    def _check_app(self, app: Flask) -> None:
        if app.extensions.get("sqlalchemy") is not self.db:
            raise RuntimeError("Call db.init_app(app) before hooks.init_app(app).")
        if EXTENSION in app.extensions:
            raise RuntimeError("hooks.init_app() was already called for this application.")

    def _make_state(self, app: Flask, settings: Settings, values: dict[str, Any]) -> State:
        bind_key = self._users.metadata.info.get("bind_key")
        with app.app_context():
            engine = self.db.engines[bind_key]
        options = merge_engine_options(self.db, app.config, bind_key)
        database = Database(engine, options, pool_size=settings.pool_size, pooler=settings.pooler)
        optional = self._find_optional(settings)
        own = self._own._replace(changes=self._find_changes(settings))
        if own.changes is None:
            self._handlers.refuse_durable()
        store = Store(database, self._mapper, own, self._fields, optional)
        return State(
            hooks=self,
            settings=settings,
            values=values,
            store=store,
            handlers=self._handlers,
            users=Users(store),
            deliveries=Deliveries(store, self._handlers, cast("Any", self.db.session)),
            authenticator=auth.make_authenticator(settings),
            secrets=tuple(SigningSecret(raw) for raw in settings.webhook_secrets),
        )

    def _get_organization_models(self) -> OrganizationModels:
        if self._organizations is None:
            raise RuntimeError(
                "There is no model of organizations yet. Set CLERK_TABLES=organizations, and use "
                "the model after hooks.init_app(app). To use it earlier, pass organization_model."
            )
        return self._organizations

    def _find_optional(self, settings: Settings) -> OrganizationTables | None:
        """Return the optional tables if a model was passed or *settings* ask for them."""
        if not self._stores_organizations and "organizations" not in settings.tables:
            return None
        if self._organizations is None:
            self._organizations = make_organization_models(self.db, self._users, None)
        return self._organizations.tables

    def _find_changes(self, settings: Settings) -> sa.Table | None:
        """Return the table of the change feed if *settings* ask for it."""
        if "changes" not in settings.tables:
            return None
        if self._changes is None:
            self._changes = make_changes_table(self._users.metadata, self._users.schema)
        return self._changes


def _make_model(db: SQLAlchemy) -> type[Any]:
    if "users" in db.metadata.tables:
        raise ValueError(
            "A table 'users' already exists. Derive its model from ClerkUser, and pass the model: "
            "ClerkHooks(db, User)."
        )
    return type("PlainUser", (ClerkUser, db.Model), {})
