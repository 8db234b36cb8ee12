"""
A pytest plugin that simulates sign-ups, events and callers, with real signatures.

Put ``pytest_plugins = ["clerkhooks.testing"]`` in the top-level conftest.py, and override the
fixture that creates the application under test::

    @pytest.fixture
    def clerkhooks_app(clerkhooks_config):
        return create_app(clerkhooks_config)

Nothing is patched. The tests sign events and tokens with their own keys, and the application
verifies the signatures as in production.

PYTEST_DONT_REWRITE avoids a warning if conftest.py imports types from here before pytest loads the
plugin.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.clerk.fake_claims import session_claims
from clerkhooks.clerk.fake_events import FakeObjects
from clerkhooks.web.state import disconnect


@pytest.fixture(scope="session")
def clerk() -> FakeClerk:
    """Return a fake Clerk instance. All tests share its keys."""
    return FakeClerk()


@pytest.fixture
def clerkhooks_config(clerk: FakeClerk, tmp_path: Path) -> dict[str, Any]:
    """Return a configuration that trusts ``clerk``. Each test has a separate SQLite file."""
    url = f"sqlite:///{tmp_path / 'clerkhooks.db'}"
    return {**clerk.environ, "DATABASE_URL": url, "SQLALCHEMY_DATABASE_URI": url, "TESTING": True}


@pytest.fixture
def clerkhooks_app(clerkhooks_config: dict[str, Any]) -> Flask:
    """Return the service. To test your own application, override this fixture."""
    from clerkhooks import create_app

    return create_app(clerkhooks_config)


@pytest.fixture
def clerk_service(clerkhooks_app: Flask, clerk: FakeClerk) -> Iterator[ClerkService]:
    """Create missing tables, and return a ``ClerkService`` for the application."""
    with clerkhooks_app.app_context():
        clerkhooks_app.extensions["sqlalchemy"].create_all()
    yield ClerkService(clerkhooks_app, clerk)
    disconnect(clerkhooks_app)


class ClerkService:
    """
    An application in this process, and the Clerk instance that it trusts.

    If a token has a role, a permission, or an organization's plan or feature, it belongs to the
    organization ``organization_id``, unless you pass another organization. ``user_id`` is the last
    user who signed up, or the id of a user without an account. ``http`` is the client of an
    anonymous caller.
    """

    def __init__(self, app: Flask, clerk: FakeClerk) -> None:
        self.app, self.clerk = app, clerk
        self.http = app.test_client()
        self.user_id, self.organization_id = clerk_id("user"), clerk_id("org")
        self._objects = FakeObjects()
        # Do not use url_for: it adds APPLICATION_ROOT, and the test client would add it again.
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
        Deliver ``user.created`` for a new user and return the id. *data* overrides fields.

        Raises:
            AssertionError: the application did not accept the event.
        """
        user_id = str(data.pop("id", clerk_id("user")))
        profile = {"email": email, "first_name": first_name, "last_name": last_name}
        user = user_data(user_id, **profile, updated_at=self._next_event())
        self._deliver_user("user.created", user | data)
        self.user_id = user_id
        return user_id

    def update(self, user_id: str, **data: Any) -> None:
        """
        Deliver ``user.updated`` for a user. *data* overrides fields, such as ``banned=True``.

        Other fields are those of the user's last event. *email* replaces all email addresses.

        Raises:
            AssertionError: the application did not accept the event.
        """
        user = self.event_data("user.updated", user_id=user_id)
        if "email" in data:
            profile = {name: user[name] for name in ("first_name", "last_name", "updated_at")}
            new = user_data(user_id, email=data.pop("email"), **profile)
            user |= {name: new[name] for name in ("email_addresses", "primary_email_address_id")}
        self._deliver_user("user.updated", user | data)

    def _deliver_user(self, event_type: str, data: Mapping[str, Any]) -> None:
        response = self.deliver(event_type, data)
        if response.status_code != 200:
            raise AssertionError(
                f"{event_type} was answered with {response.status_code}: {response.text}"
            )

    def event_data(
        self, event_type: str, *, user_id: str | None = None, organization_id: str | None = None
    ) -> dict[str, Any]:
        """
        Return complete ``data`` for an event of any type.

        It is about ``user_id`` and ``organization_id``, unless you pass others. Names, addresses
        and other fields are those of the user's and the organization's last event.
        """
        user_id, organization_id = user_id or self.user_id, organization_id or self.organization_id
        now = self._next_event()
        return self._objects.event_data(event_type, user_id, organization_id, updated_at=now)

    def deliver(
        self,
        event_type: str,
        data: Mapping[str, Any] | None = None,
        message_id: str | None = None,
        timestamp: int | None = None,
    ) -> TestResponse:
        """
        Deliver a signed event and return the response.

        By default, *data* is what ``event_data`` returns. The event is newer than all earlier
        events, unless *data* has an older ``updated_at`` (in milliseconds). To simulate a retry,
        pass the same *message_id* again. *timestamp* is the time of the attempt in seconds, by
        default the current time.
        """
        data = self.event_data(event_type) if data is None else data
        self._objects.remember(event_type, data)
        body = event_body(event_type, data, self._next_event())
        return self.deliver_body(body, message_id, timestamp)

    def deliver_body(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> TestResponse:
        """Sign and deliver *body*, even if it is not an event, and return the response."""
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
        Return a session token (version 2) for *user_id*, as Clerk would create it.

        *role* has the form ``org:admin``. Each permission has the form ``org:notes:delete``. *plan*
        and *feature* may begin with ``org:`` or ``user:``. Without a prefix, they belong to the
        organization if the token has one. *organization* is an id. *claims* such as ``fva=[0, 0]``
        are added unchanged and override other claims. A claim of None is omitted. ``lifetime=`` is
        in seconds.

        Raises:
            ValueError: Clerk would never put that permission, plan or feature in a token.
        """
        default = self.organization_id
        granted = session_claims(organization, role, permissions, plan, feature, default)
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
        """
        Return a test client that is signed in as *user_id*.

        Each request carries a new token for the same session, unless the request has its own
        Authorization header. The arguments are the same as for ``token``.
        """
        default = self.organization_id
        granted = session_claims(organization, role, permissions, plan, feature, default)
        fixed = {"sid": clerk_id("sess")} | granted | claims
        new_token = partial(self.clerk.session_token, user_id, **fixed)
        client = self.app.test_client()
        send = client.open

        def send_signed_in(*args: Any, **kwargs: Any) -> TestResponse:
            client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_token()}"
            return send(*args, **kwargs)

        client.open = send_signed_in  # type: ignore[method-assign]  # works with any test_client_class
        return client

    def _next_event(self) -> int:
        # If two events had the same millisecond, their random ids would determine the order.
        self._last_event = max(self._last_event + 1, int(time.time() * 1000))
        return self._last_event
