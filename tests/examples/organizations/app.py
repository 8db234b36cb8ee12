"""Organizations and memberships, stored from Clerk's events in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import ClerkHooks, Event, Versioned, upsert


class Base(DeclarativeBase):
    """The application's declarative base."""


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base  # type checkers do not understand db.Model
else:
    Model = db.Model


class Kept(Versioned):
    """Common columns. A row is a tombstone if ``deleted_at`` is set."""

    id: Mapped[str] = mapped_column(primary_key=True)
    deleted_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))


class Organization(Kept, Model):
    """An organization."""

    __tablename__ = "organizations"

    name: Mapped[str | None]
    slug: Mapped[str | None]


class Membership(Kept, Model):
    """
    A user's membership. Clerk creates a new one if a user leaves and returns.

    There are no foreign keys, because the event of a membership may arrive before the events of the
    organization and the user.
    """

    __tablename__ = "memberships"

    organization_id: Mapped[str | None] = mapped_column(index=True)
    user_id: Mapped[str | None] = mapped_column(index=True)
    role: Mapped[str | None]


hooks = ClerkHooks(db)


@hooks.on("organization.*")
def keep_organization(event: Event) -> None:
    """Create, update or delete an organization."""
    keep(Organization, event, name=event.data.get("name"), slug=event.data.get("slug"))


@hooks.on("organizationMembership.*")
def keep_membership(event: Event) -> None:
    """Create, update or delete a membership."""
    organization = event.data.get("organization") or {}
    user = event.data.get("public_user_data") or {}
    keep(
        Membership,
        event,
        organization_id=organization.get("id"),
        user_id=user.get("user_id"),
        role=event.data.get("role"),
    )


def keep(model: type[Kept], event: Event, **values: Any) -> None:
    """Write the event's row unless the stored row is newer. A deletion is always final."""
    if event.type.endswith(".deleted"):
        # No event has a higher version, so no event can restore the row, even in a race.
        event = replace(event, version=event.version._replace(updated_at=2**63 - 1))
        values = dict.fromkeys(values) | {"deleted_at": datetime.now(UTC)}
    upsert(model, event, id=event.data["id"], **values)


def create_app(config: Mapping[str, Any]) -> Flask:
    """Create the application."""
    app = Flask(__name__)
    app.config.update(config)
    db.init_app(app)
    hooks.init_app(app)
    return app
