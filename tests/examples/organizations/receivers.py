"""How Clerk's events become rows: in the message's own transaction, in any order, each exactly once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa

from clerkhooks.clerk.events import Event
from clerkhooks.models import VERSION_COLUMNS, Outcome, db, insert_into, version_columns
from clerkhooks.signals import event_processing
from tests.examples.organizations.models import Organization, OrganizationMembership


def connect() -> None:
    """Listen to both kinds of events. ``weak=False`` would be needed for functions that nobody else holds."""
    event_processing.connect(store_organization, sender="organization.")
    event_processing.connect(store_membership, sender="organizationMembership.")


def store_organization(sender: str, *, event: Event, outcome: Outcome) -> None:
    """Create, update or bury an organization."""
    _store(Organization, event, name=event.data.get("name"), slug=event.data.get("slug"))


def store_membership(sender: str, *, event: Event, outcome: Outcome) -> None:
    """Create, update or bury a membership."""
    organization = event.data.get("organization") or {}
    user = event.data.get("public_user_data") or {}
    values = {"organization_id": organization.get("id"), "user_id": user.get("user_id"), "role": event.data.get("role")}
    _store(OrganizationMembership, event, **values)


def _store(model: type[Organization | OrganizationMembership], event: Event, **values: Any) -> None:
    """Write *values* unless the row is of a newer version already; a deletion is final, also when it comes first."""
    deleted = event.type.endswith(".deleted")
    if deleted:
        values = dict.fromkeys(values) | {"deleted_at": datetime.now(UTC)}
    insert = insert_into(cast("sa.Table", model.__table__), db.engine.dialect.name)
    insert = insert.values(id=event.data["id"], **values, **version_columns(None if deleted else event.version))
    guard = model.deleted_at.is_(None) if deleted else sa.and_(model.deleted_at.is_(None), model.is_older_than(insert.excluded))
    changes = {name: insert.excluded[name] for name in (*values, *VERSION_COLUMNS)}
    db.session.execute(insert.on_conflict_do_update(index_elements=["id"], set_=changes, where=guard))
