"""Shared configuration, and a check that an application's users table stays correct."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from clerkhooks.clerk.fake import FakeClerk, clerk_id, user_data
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect


def make_db() -> SQLAlchemy:
    """Create a Flask-SQLAlchemy object with its own metadata, as an application does."""

    class Base(DeclarativeBase):
        pass

    return SQLAlchemy(model_class=Base)


def configuration(clerk: FakeClerk, url: str, **more: Any) -> dict[str, Any]:
    """Return the configuration of an application that trusts the fake *clerk*."""
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    return {
        **clerk.environ,
        "SQLALCHEMY_DATABASE_URI": url,
        "SECRET_KEY": "0123456789abcdef",
        **more,
    }


@contextmanager
def tables(app: Flask) -> Iterator[None]:
    """Create the tables of *app*; drop them and close its connections afterwards."""
    db = app.extensions["sqlalchemy"]
    with app.app_context():
        db.create_all()
    try:
        yield
    finally:
        disconnect(app)  # before drop_all, because views may leave connections unusable
        with app.app_context():
            db.drop_all()
        disconnect(app)


def check_users_stay_correct(app: Flask, clerk: FakeClerk, me: str = "/api/me") -> None:
    """Deliver sign-ups, deletions and late or repeated messages, and check the users."""
    service = ClerkService(app, clerk)
    ada = service.sign_up(first_name="Ada", last_name="Byron")
    now = int(time.time() * 1000) + 10_000
    newer = user_data(
        ada, email="ada@example.org", first_name="Ada", last_name="Lovelace", updated_at=now
    )
    message_id = clerk_id("msg")
    older = newer | {"last_name": "King", "updated_at": now - 5_000}
    assert service.deliver("user.updated", newer, message_id).get_json()["outcome"] == "applied"
    assert service.deliver("user.updated", newer, message_id).get_json()["outcome"] == "duplicate"
    assert service.deliver("user.updated", older).get_json()["outcome"] == "stale"
    assert name_of(service, ada, me) == "Ada Lovelace"

    early = clerk_id("user")
    assert name_of(service, early, me) == "New User"
    service.sign_up(id=early, first_name="Grace", last_name="Hopper")
    assert name_of(service, early, me) == "Grace Hopper"

    deleted = {"deleted": True, "id": ada, "object": "user"}
    assert service.deliver("user.deleted", deleted).get_json()["outcome"] == "applied"
    response = service.client(ada).get(me)
    assert (response.status_code, response.get_json()["reason"]) == (401, "user_deleted")
    assert service.http.get(me).get_json()["reason"] == "token_missing"


def name_of(service: ClerkService, user_id: str, me: str = "/api/me") -> str:
    """Request the path *me* as the user, and return the name in the response."""
    response = service.client(user_id).get(me)
    assert response.status_code == 200, response.text
    return str(response.get_json()["name"])
