"""An application that passes ``mypy --strict`` without a cast or an ignored error."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa
from flask import Flask
from flask.views import MethodView
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import (
    ClerkHooks,
    ClerkUser,
    Event,
    Outcome,
    SettingsError,
    Versioned,
    current_session,
    current_user,
    from_clerk,
    payloads,
    require_auth,
    upsert,
)


class Base(DeclarativeBase):
    """The declarative base."""


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base
else:
    Model = db.Model


def to_upper(value: str) -> str:
    """Return *value* in upper case."""
    return value.upper()


class User(ClerkUser, Model):
    """A user with columns of the application and columns from Clerk."""

    username: Mapped[str | None] = from_clerk("username", index=True)
    plan: Mapped[str] = mapped_column(server_default="free")
    tier: Mapped[str | None] = from_clerk("public_metadata.tier", sa.String(20), parse=to_upper)

    @property
    def label(self) -> str:
        """The name to show on pages."""
        return self.username or self.name


class Organization(Versioned, Model):
    """An organization, stored by a handler."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


hooks = ClerkHooks(db, User)
received: list[tuple[str, str, int, datetime | None, bool]] = []
roles: dict[str, str] = {}
erased: list[str | None] = []


@hooks.on("organization.*")
def keep_organization(event: Event) -> bool:
    """Store the organization of an event."""
    name: str = event.data["name"]
    moment: datetime | None = event.occurred_at
    is_applied: bool = event.outcome is Outcome.APPLIED
    received.append((event.type, event.message_id, event.version.updated_at, moment, is_applied))
    return upsert(Organization, event, id=event.data["id"], name=name)


@hooks.on("organizationMembership.created")
def keep_role(event: Event[payloads.OrganizationMembership]) -> None:
    """Remember the role of a new member."""
    organization_id: str = event.data["organization"]["id"]
    roles[organization_id] = event.data["role"]
    upsert(Organization, event, id=organization_id, name=event.data["organization"]["name"])


@hooks.on("user.*")
def erase(event: Event[payloads.User | payloads.DeletedObject]) -> None:
    """Erase what is stored under the application's own id of a deleted user."""
    if "deleted" in event.data:
        erased.append(event.data.get("external_id"))


@hooks.on("user.created", after_commit=True)
@hooks.on("user.promoted")
@hooks.on("organization.deleted", after_commit=True)
def welcome(event: Event) -> None:
    """Do nothing. A real application would send an email here."""


def create_app() -> Flask:
    """Create the application."""
    app = Flask(__name__)
    app.config.from_prefixed_env("SHOP")
    db.init_app(app)
    try:
        hooks.init_app(app, routes=("webhooks", "me", "health"), url_prefix="/clerk")
    except SettingsError as error:
        raise SystemExit(str(error)) from None

    @app.get("/me")
    @require_auth
    def me() -> dict[str, str | None]:
        username: str | None = hooks.current_user.username
        plan: str = hooks.current_user.plan
        label: str = hooks.current_user.label
        since: datetime = hooks.current_user.created_at
        return {"username": username, "plan": plan, "label": label, "since": since.isoformat()}

    @app.get("/plain/<int:number>")
    @require_auth(role="org:admin", reverification="strict")
    def plain(number: int) -> tuple[str, int]:
        organization = current_session.organization
        return f"{current_user.email} {organization.id if organization else number}", 200

    @app.get("/open")
    @require_auth(optional=True)
    def for_everyone() -> str:
        user, session = hooks.optional_user, hooks.optional_session
        if user is None or session is None:
            return "Please sign in."
        return f"Hello {user.username}, {session.has(plan='pro')}"

    @app.get("/later")
    @require_auth
    async def later() -> str:
        return hooks.current_user.tier or ""

    class Profile(MethodView):
        @require_auth
        def get(self, user_id: str) -> str:
            row = db.session.get_one(User, user_id)
            return db.session.scalars(sa.select(User.plan).where(User.id == row.id)).one()

    app.add_url_rule("/profile/<user_id>", view_func=Profile.as_view("profile"))
    return app


def make_plain_hooks() -> ClerkHooks[ClerkUser]:
    """Return hooks that use the default user model."""
    return ClerkHooks(SQLAlchemy())
