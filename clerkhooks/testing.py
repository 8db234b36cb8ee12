"""
A pytest plugin: users sign up, events arrive and callers sign in, all signed for real.

Put ``pytest_plugins = ["clerkhooks.testing"]`` into the topmost conftest.py, and tell the plugin how to
make the application under test::

    @pytest.fixture
    def clerkhooks_app(clerkhooks_config):
        return create_app(clerkhooks_config)

Nothing is patched: events and tokens are signed with keys that the tests hold, and verified by the
code that verifies them in production.

PYTEST_DONT_REWRITE: a conftest.py may import from here, for its types, before pytest loads the
plugin.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.web.state import disconnect

_PERMISSION = re.compile(r"org:([^:,\s]+):([^:,\s]+)")
_SCOPES = {"org": "o", "user": "u"}


@pytest.fixture(scope="session")
def clerk() -> FakeClerk:
    """A Clerk instance whose keys the tests hold; one for the session, since keys are slow to make."""
    return FakeClerk()


@pytest.fixture
def clerkhooks_config(clerk: FakeClerk, tmp_path: Path) -> dict[str, Any]:
    """Configuration that trusts ``clerk``, with a SQLite file of the test's own."""
    url = f"sqlite:///{tmp_path / 'clerkhooks.db'}"
    return {**clerk.environ, "DATABASE_URL": url, "SQLALCHEMY_DATABASE_URI": url, "TESTING": True}


@pytest.fixture
def clerkhooks_app(clerkhooks_config: dict[str, Any]) -> Flask:
    """The application under test: the service. Override it with your own factory."""
    from clerkhooks import create_app

    return create_app(clerkhooks_config)


@pytest.fixture
def clerk_service(clerkhooks_app: Flask, clerk: FakeClerk) -> Iterator[ClerkService]:
    """The application as Clerk and signed-in users see it. Missing tables are created."""
    with clerkhooks_app.app_context():
        clerkhooks_app.extensions["sqlalchemy"].create_all()
    yield ClerkService(clerkhooks_app, clerk)
    disconnect(clerkhooks_app)


class SignedInClient(FlaskClient):
    """A test client whose every request carries a session token made for it; an Authorization of the request's own wins."""

    def __init__(self, app: Flask, new_token: Callable[[], str]) -> None:
        super().__init__(app, app.response_class)
        self._new_token = new_token

    def open(
        self, *args: Any, buffered: bool = False, follow_redirects: bool = False, **kwargs: Any
    ) -> TestResponse:
        """Send the request, signed in."""
        self.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {self._new_token()}"
        return super().open(*args, buffered=buffered, follow_redirects=follow_redirects, **kwargs)


class ClerkService:
    """
    An application in this process, and the Clerk instance that it trusts.

    ``organization_id`` is the organization of every token that has a role, permissions or the like
    and names no other.
    """

    def __init__(self, app: Flask, clerk: FakeClerk) -> None:
        self.app, self.clerk = app, clerk
        self.http = app.test_client()
        self.organization_id = clerk_id("org")
        # Not url_for: the test client adds APPLICATION_ROOT, too.
        paths = {rule.endpoint: rule.rule for rule in app.url_map.iter_rules()}
        self._webhook_path = paths.get("clerkhooks.receive_webhook", "/webhooks/clerk")
        self._last_event = 0

    def sign_up(
        self,
        *,
        email: str | None = "ada@example.org",
        first_name: str = "Ada",
        last_name: str = "Lovelace",
        **data: Any,
    ) -> str:
        """
        Deliver the ``user.created`` of a new user and return the id; *data* replaces fields.

        Raises:
            AssertionError: if the service does not take it.
        """
        now = self._next_event()
        whole = (
            user_data(
                clerk_id("user"),
                email=email,
                first_name=first_name,
                last_name=last_name,
                updated_at=now,
            )
            | data
        )
        response = self.deliver("user.created", whole)
        if response.status_code != 200:
            raise AssertionError(
                f"user.created was answered {response.status_code}: {response.text}"
            )
        return str(whole["id"])

    def deliver(
        self,
        event_type: str,
        data: dict[str, Any],
        message_id: str | None = None,
        timestamp: int | None = None,
    ) -> TestResponse:
        """
        Deliver an event, signed, and give the answer.

        It is newer than every event before it, unless *data* has an ``updated_at`` (milliseconds)
        that says otherwise. A retry has the same *message_id*; *timestamp* (seconds) is the
        attempt's, and now by default.
        """
        return self.deliver_body(
            event_body(event_type, data, self._next_event()), message_id, timestamp
        )

    def deliver_body(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> TestResponse:
        """Deliver *body* whatever it holds, signed, and give the answer."""
        headers = self.clerk.headers(body, message_id, timestamp)
        return self.http.post(self._webhook_path, data=body, headers=headers)

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

        *role* is one such as ``org:admin``, *permissions* such as ``org:notes:delete``; plan and
        feature may begin with ``org:`` or ``user:``, and are else the organization's if there is
        one. *organization* is an id. *claims* are added as they are and win, such as ``fva=[0,
        0]``; one given as None is left out. ``lifetime=`` is in seconds.
        """
        if role or permissions or any(name and name.startswith("org:") for name in (plan, feature)):
            organization = organization or self.organization_id
        granted = session_claims(
            organization, role=role, permissions=permissions, plan=plan, feature=feature
        )
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
        new_token = partial(
            self.token,
            user_id,
            role=role,
            permissions=permissions,
            plan=plan,
            feature=feature,
            organization=organization,
        )
        return SignedInClient(self.app, partial(new_token, **claims))

    def _next_event(self) -> int:
        # Two events of one millisecond would be ordered by their random ids, and a test would fail
        # once in a while.
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
    claims: dict[str, Any] = {
        "fea": ",".join(features) or None,
        "pla": _scoped(plan, default) if plan else None,
    }
    if organization:
        name = (role or "org:member").removeprefix("org:")
        claims["o"] = {
            "id": organization,
            "rol": name,
            "slg": organization.removeprefix("org_").lower(),
        }
        actions = list(dict.fromkeys(action for _, action in granted))
        # A number for each feature of the organization, in the order of fea, whose bits index per.
        packed = [
            sum(1 << at for at, action in enumerate(actions) if (name[2:], action) in granted)
            for name in features
            if name[0] == "o"
        ]
        claims["o"] |= (
            {"per": ",".join(actions), "fpm": ",".join(map(str, packed))} if packed else {}
        )
    return claims


def _parse_permission(permission: str) -> tuple[str, str]:
    """Feature and action."""
    found = _PERMISSION.fullmatch(permission)
    if found is None:
        raise ValueError(
            f"A permission is org:feature:action, such as org:notes:delete; not {permission!r}."
        )
    if found[1].startswith("sys_"):
        raise ValueError(
            f"Clerk puts no system permission into a session token, so {permission} would always be denied. Define your own."
        )
    return found[1], found[2]


def _scoped(name: str, default: str) -> str:
    scope, colon, rest = name.partition(":")
    if colon and scope not in _SCOPES:
        raise ValueError(
            f"A plan or a feature is a name, or one that begins with org: or user:; not {name!r}."
        )
    return f"{_SCOPES[scope]}:{rest}" if colon else f"{default}:{name}"
