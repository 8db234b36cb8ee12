"""What the application keeps of Clerk's organizations."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from clerkhooks.models import Model, UTCDateTime, Versioned


class Organization(Versioned, Model):
    """An organization; a tombstone once ``deleted_at`` is set, for its late events must not revive it."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    name: Mapped[str | None] = mapped_column(sa.Text)
    slug: Mapped[str | None] = mapped_column(sa.Text)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class OrganizationMembership(Versioned, Model):
    """
    A user's membership. Clerk gives each one an id of its own, also when a user leaves and comes back.

    No foreign keys: a membership's event may well come before its organization's or its user's.
    """

    __tablename__ = "organization_memberships"

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    organization_id: Mapped[str | None] = mapped_column(sa.Text, index=True)
    user_id: Mapped[str | None] = mapped_column(sa.Text, index=True)
    role: Mapped[str | None] = mapped_column(sa.Text)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
