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
PRO = "cplan_pro"  # from Clerk Dashboard → Billing. The free plan has active subscriptions too.


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
    user_id = payer.get("user_id")
    upsert(
        Subscription,
        event,
        id=data["id"],
        user_id=None if is_deleted(user_id) else user_id,
        organization_id=payer.get("organization_id"),
        status=data["status"],
        plan_ids=[item["plan_id"] for item in items if item["status"] in PAID and item["plan_id"]],
    )


def is_deleted(user_id: str | None) -> bool:
    """
    Return whether the user was deleted.

    The events of subscriptions may arrive after the deletion. The lock makes a concurrent deletion
    wait until this message is committed, so that it finds the subscription.
    """
    user = hooks.model
    query = sa.select(user.deleted_at).where(user.id == user_id).with_for_update()
    return db.session.scalar(query) is not None


@hooks.on("user.deleted")
def erase_payer(event: Event[payloads.DeletedObject]) -> None:
    """Forget which user paid."""
    is_theirs = Subscription.user_id == event.data["id"]
    db.session.execute(sa.update(Subscription).where(is_theirs).values(user_id=None))


def has_plan(user_id: str, plan_id: str) -> bool:
    """Return whether a paid subscription of the user contains the plan."""
    is_paid = (Subscription.user_id == user_id, Subscription.status.in_(PAID))
    found = db.session.scalars(sa.select(Subscription.plan_ids).where(*is_paid))
    return any(plan_id in plan_ids for plan_ids in found)


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
    """Show a report to users who have paid for it."""
    if not has_plan(current_user.id, PRO):
        return {"error": "Please subscribe."}, 402
    return {"report": "…"}, 200
