"""
A pytest plugin for applications that are built on clerkhooks: users sign up, events arrive and callers sign in for real.

Put ``pytest_plugins = ["clerkhooks.testing"]`` into the topmost conftest.py. Nothing is patched: what Clerk would sign is
signed with keys that the tests hold, and verified by the code that verifies it in production.

PYTEST_DONT_REWRITE: a conftest.py may import from here, for its types, before pytest loads the plugin.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_migrate import upgrade
from werkzeug.test import TestResponse

from clerkhooks.app import create_app
from clerkhooks.cli.pretend import PretendedClerk, clerk_id, event_body, user_data
from clerkhooks.models import db
from clerkhooks.settings import Settings

Factory = Callable[[Settings], Flask]
_PERMISSION = re.compile(r"org:([^:,\s]+):([^:,\s]+)")
_SCOPES = {"org": "o", "user": "u"}


@pytest.fixture(scope="session")
def clerk() -> PretendedClerk:
    """A Clerk instance whose keys the tests hold; one for the session, for keys take their time to be made."""
    return PretendedClerk()


@pytest.fixture(scope="session")
def clerkhooks_factory() -> Factory:
    """What makes the application. Override it with your own factory, session-scoped; it also finds your migrations."""
    return create_app


@pytest.fixture(scope="session")
def clerkhooks_migrated(clerk: PretendedClerk, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Factory], Path]:
    """Give a migrated SQLite file without rows; it is made once for each factory. Copy it, and leave it as it is."""
    ready: dict[Factory, Path] = {}

    def find(factory: Factory) -> Path:
        if factory not in ready:
            ready[factory] = tmp_path_factory.mktemp("clerkhooks") / "migrated.db"
            migrate(factory(_settings(clerk, ready[factory])))
        return ready[factory]

    return find


@pytest.fixture
def clerkhooks_settings(
    clerk: PretendedClerk, clerkhooks_factory: Factory, clerkhooks_migrated: Callable[[Factory], Path], tmp_path: Path
) -> Settings:
    """Settings that trust ``clerk``, with a migrated SQLite file of the test's own."""
    copy = tmp_path / "clerkhooks.db"
    shutil.copy(clerkhooks_migrated(clerkhooks_factory), copy)
    return _settings(clerk, copy)


@pytest.fixture
def clerkhooks_app(clerkhooks_factory: Factory, clerkhooks_settings: Settings) -> Iterator[Flask]:
    """The application of one test. Override it to register blueprints on it."""
    app = clerkhooks_factory(clerkhooks_settings)
    yield app
    disconnect(app)


@pytest.fixture
def clerk_service(clerkhooks_app: Flask, clerk: PretendedClerk) -> ClerkService:
    """The application as Clerk and signed-in users meet it."""
    return ClerkService(clerkhooks_app, clerk)


class SignedInClient(FlaskClient):
    """A test client whose every request carries a session token made for it; an Authorization of the request's own wins."""

    def __init__(self, app: Flask, new_token: Callable[[], str]) -> None:
        super().__init__(app, app.response_class)
        self._new_token = new_token

    def open(self, *args: Any, buffered: bool = False, follow_redirects: bool = False, **kwargs: Any) -> TestResponse:
        """Send the request, signed in."""
        self.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {self._new_token()}"
        return super().open(*args, buffered=buffered, follow_redirects=follow_redirects, **kwargs)


class ClerkService:
    """
    An application in this process, and the Clerk instance that it trusts.

    ``organization_id`` is the organization of every token that has a role, permissions or the like and names no other.
    """

    def __init__(self, app: Flask, clerk: PretendedClerk) -> None:
        self.app, self.clerk = app, clerk
        self.http = app.test_client()
        self.organization_id = clerk_id("org")
        self._last_event = 0

    def sign_up(self, *, email: str | None = "ada@example.org", first_name: str = "Ada", last_name: str = "Lovelace", **data: Any) -> str:
        """
        Deliver the ``user.created`` of a new user, and give the user's id; *data* replaces fields of the event's data.

        Raises:
            AssertionError: if the service does not take it.
        """
        now = self._next_event()
        whole = user_data(clerk_id("user"), email=email, first_name=first_name, last_name=last_name, updated_at=now) | data
        response = self.deliver("user.created", whole)
        if response.status_code != 200:
            raise AssertionError(f"user.created was answered {response.status_code}: {response.text}")
        return str(whole["id"])

    def deliver(self, event_type: str, data: dict[str, Any], message_id: str | None = None, timestamp: int | None = None) -> TestResponse:
        """
        Deliver an event, signed, and give the answer.

        It is newer than every event before it, unless *data* has an ``updated_at`` (milliseconds) that says otherwise.
        A retry has the same *message_id*; *timestamp* (seconds) is the attempt's, and now by default.
        """
        return self.deliver_body(event_body(event_type, data, self._next_event()), message_id, timestamp)

    def deliver_body(self, body: bytes, message_id: str | None = None, timestamp: int | None = None) -> TestResponse:
        """Deliver *body* whatever it holds, signed, and give the answer."""
        return self.http.post("/webhooks/clerk", data=body, headers=self.clerk.headers(body, message_id, timestamp))

    def token(
        self,
        user_id: str,
        *,
        role: str | None = None,
        permissions: Sequence[str] = (),
        plan: str | None = None,
        feature: str | None = None,
        organization: str | None = None,
        **claims: Any,
    ) -> str:
        """
        A session token of *user_id*, as Clerk would make it (version 2).

        *role* is one such as ``org:admin``, *permissions* such as ``org:notes:delete``; plan and feature may begin with
        ``org:`` or ``user:``, and are else the organization's if there is one. *organization* is an id. *claims* are
        added as they are and win, such as ``fva=[0, 0]``; one given as None is left out. ``lifetime=`` is in seconds.
        """
        if role or permissions or any(name and name.startswith("org:") for name in (plan, feature)):
            organization = organization or self.organization_id
        granted = session_claims(organization, role=role, permissions=permissions, plan=plan, feature=feature)
        return self.clerk.session_token(user_id, **granted | claims)

    def client(
        self,
        user_id: str,
        *,
        role: str | None = None,
        permissions: Sequence[str] = (),
        plan: str | None = None,
        feature: str | None = None,
        organization: str | None = None,
        **claims: Any,
    ) -> FlaskClient:
        """A test client signed in as *user_id*, in one session, with a fresh ``token`` of these arguments for every request."""
        claims = {"sid": clerk_id("sess")} | claims
        new_token = partial(self.token, user_id, role=role, permissions=permissions, plan=plan, feature=feature, organization=organization)
        return SignedInClient(self.app, partial(new_token, **claims))

    def _next_event(self) -> int:
        # Two events of one millisecond would be ordered by their random ids, and a test would fail once in a while.
        self._last_event = max(self._last_event + 1, int(time.time() * 1000))
        return self._last_event


def session_claims(
    organization: str | None,
    *,
    role: str | None = None,
    permissions: Sequence[str] = (),
    plan: str | None = None,
    feature: str | None = None,
) -> dict[str, Any]:
    """
    The claims of a member of *organization*, or of a user on their own where it is None.

    Raises:
        ValueError: for a permission, a plan or a feature that no token of Clerk's could carry.

    Source: Clerk, "Session tokens", default claims, version 2.
    """
    granted = [_parse_permission(permission) for permission in permissions]
    default = "o" if organization else "u"
    listed = [_scoped(feature, default)] if feature else []
    features = list(dict.fromkeys([f"o:{name}" for name, _ in granted] + listed))
    claims: dict[str, Any] = {"fea": ",".join(features) or None, "pla": _scoped(plan, default) if plan else None}
    if organization:
        name = (role or "org:member").removeprefix("org:")
        claims["o"] = {"id": organization, "rol": name, "slg": organization.removeprefix("org_").lower()}
        actions = list(dict.fromkeys(action for _, action in granted))
        # A number for each feature of the organization, in the order of fea, whose bits index per.
        packed = [sum(1 << at for at, action in enumerate(actions) if (name[2:], action) in granted) for name in features if name[0] == "o"]
        claims["o"] |= {"per": ",".join(actions), "fpm": ",".join(map(str, packed))} if packed else {}
    return claims


def migrate(app: Flask) -> None:
    """Bring the database of *app* to the newest of all its migrations; a SQLite file is whole then, without a log beside it."""
    with app.app_context():
        upgrade(revision="heads")
        if db.engine.dialect.name == "sqlite":
            db.session.execute(db.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    disconnect(app)


def disconnect(app: Flask) -> None:
    """Close the connections that *app* has to its database."""
    with app.app_context():
        db.session.remove()
        db.engine.dispose()


def _settings(clerk: PretendedClerk, file: Path) -> Settings:
    return Settings.from_environ(clerk.environ | {"DATABASE_URL": f"sqlite:///{file}"})


def _parse_permission(permission: str) -> tuple[str, str]:
    """Feature and action."""
    found = _PERMISSION.fullmatch(permission)
    if found is None:
        raise ValueError(f"A permission is org:feature:action, such as org:notes:delete; not {permission!r}.")
    if found[1].startswith("sys_"):
        raise ValueError(f"Clerk puts no system permission into a session token, so {permission} would always be denied. Define your own.")
    return found[1], found[2]


def _scoped(name: str, default: str) -> str:
    scope, colon, rest = name.partition(":")
    if colon and scope not in _SCOPES:
        raise ValueError(f"A plan or a feature is a name, or one that begins with org: or user:; not {name!r}.")
    return f"{_SCOPES[scope]}:{rest}" if colon else f"{default}:{name}"
