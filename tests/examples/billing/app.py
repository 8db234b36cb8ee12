"""Subscriptions, stored from Clerk's billing events in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import ClerkHooks, Event, Versioned, current_user, payloads, require_auth, upsert

PAID = ("active", "past_due")  # a payment may be late without an interruption


class Base(DeclarativeBase):
    """The application's declarative base."""


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base  # type checkers do not understand db.Model
else:
    Model = db.Model


class Subscription(Versioned, Model):
    """
    The subscription of a user or an organization.

    There are no foreign keys, because a subscription's event may arrive before that of its user.
    """

    __tablename__ = "subscriptions"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str | None] = mapped_column(index=True)
    organization_id: Mapped[str | None] = mapped_column(index=True)
    status: Mapped[str]
    plan_ids: Mapped[list[str]] = mapped_column(sa.JSON)


hooks = ClerkHooks(db)


@hooks.on("subscription.*")
def keep_subscription(event: Event[payloads.SubscriptionEventPayload]) -> None:
    """Create or update a subscription, unless the stored row is newer."""
    data = event.data
    payer, items = data["payer"], data["items"]
    upsert(
        Subscription,
        event,
        id=data["id"],
        user_id=payer.get("user_id"),
        organization_id=payer.get("organization_id"),
        status=data["status"],
        plan_ids=[item["plan_id"] for item in items if item["status"] in PAID and item["plan_id"]],
    )


@hooks.on("user.deleted")
def erase_payer(event: Event[payloads.DeletedObject]) -> None:
    """Forget which user paid."""
    is_theirs = Subscription.user_id == event.data["id"]
    db.session.execute(sa.update(Subscription).where(is_theirs).values(user_id=None))


def has_paid(user_id: str) -> bool:
    """Return whether the user has a subscription that is paid."""
    found = sa.exists().where(Subscription.user_id == user_id, Subscription.status.in_(PAID))
    return bool(db.session.scalar(sa.select(found)))


def create_app(config: Mapping[str, Any]) -> Flask:
    """Create the application."""
    app = Flask(__name__)
    app.config.update(config)
    db.init_app(app)
    hooks.init_app(app)
    app.add_url_rule("/report", view_func=show_report)
    return app


@require_auth
def show_report() -> tuple[dict[str, str], int]:
    """Show a report to users who have paid."""
    if not has_paid(current_user.id):
        return {"error": "Please subscribe."}, 402
    return {"report": "…"}, 200
