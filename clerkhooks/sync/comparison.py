"""Comparison of an object from the Backend API with the stored row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from clerkhooks.clerk.account import ACCOUNT, is_barred
from clerkhooks.clerk.events import Snapshot
from clerkhooks.clerk.kinds import USER
from clerkhooks.events import BARRED, RESTORED, Event, Outcome, Version
from clerkhooks.store.models import VERSION_COLUMNS


class Result(StrEnum):
    """The result of a sync for one object."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    NEWER_HERE = "newer_here"
    TOMBSTONED = "tombstoned"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    An object whose row differs from Clerk's data or could not be compared.

    *kind* is ``missing_here``, ``unfilled_here``, ``deleted_here``, ``differs``, ``gone_at_clerk``,
    ``failed``, ``unconfirmed`` or ``handler_failed``. *fields* maps the name of each field that
    differs to its stored value and its value at Clerk. The values are profile data and must not be
    logged.
    """

    kind: str
    id: str | None
    reason: str | None = None
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    noun: str = "user"


@dataclass(frozen=True, repr=False)
class Comparison:
    """An object from Clerk, the *values* to store, and the stored *row* (None if missing)."""

    snapshot: Snapshot
    values: Mapping[str, Any]
    row: Any

    @property
    def kind(self) -> str:
        """The kind of finding to report if the row differs."""
        if self.row is None:
            return "missing_here"
        if self.row.deleted_at is not None:
            return "deleted_here"
        return "unfilled_here" if self.row.version_updated_at is None else "differs"

    @property
    def version(self) -> Version:
        """
        The version to store.

        Usually, it is the snapshot's version. Clerk does not document that every change of the
        state moves ``updated_at``. If only the state differs, the snapshot ranks by the time at
        which it was requested, so events from before that time do not undo it.
        """
        version = self.snapshot.version
        is_same = self.row is not None and self.row.version_updated_at == version.updated_at
        has_changed = is_same and not self.fields.keys().isdisjoint(self.snapshot.kind.state)
        return version._replace(timestamp=self.snapshot.read_at) if has_changed else version

    @property
    def is_behind(self) -> bool:
        """Whether the row is missing, or older than the snapshot."""
        if self.row is None:
            return True
        version = tuple(getattr(self.row, name) for name in VERSION_COLUMNS)
        if version[0] is None:  # no profile yet, or a tombstone from user.deleted, which is final
            return self.row.deleted_at is None
        is_revived = self.row.deleted_at is not None and version[0] < self.snapshot.read_at
        return is_revived or version < self.version

    @property
    def new_row(self) -> dict[str, Any]:
        """The row to store."""
        version = dict(zip(VERSION_COLUMNS, self.version, strict=True))
        return {"id": self.snapshot.id, **self.values, **version}

    @property
    def changes_access(self) -> bool:
        """Whether the row's user becomes barred or is restored, of which handlers are told."""
        if self.snapshot.kind is not USER or not self.is_behind:
            return False
        was_barred = self.row is not None and is_barred(self.row._mapping)
        return was_barred != is_barred(self.values)

    @property
    def event(self) -> Event:
        """The event that tells handlers of the changed account state."""
        change = BARRED if is_barred(self.values) else RESTORED
        data, version = self.snapshot.data, self.version
        at = datetime.fromtimestamp((version.timestamp or version.updated_at) / 1000, UTC)
        return Event(change, data, version.message_id, version, at, Outcome.APPLIED)

    @property
    def lacks_declared(self) -> bool:
        """Whether the row has the snapshot's version and an unfilled declared column."""
        if self.is_behind or self.row.version_updated_at != self.snapshot.updated_at:
            return False
        declared = self.fields.keys() - self.snapshot.kind.tombstone.keys()
        return any(self.fields[name][0] is None for name in declared)

    @property
    def is_edited(self) -> bool:
        """Whether the row differs but has Clerk's version. A sync does not overwrite such a row."""
        same = self.row is not None and self.row.version_updated_at == self.snapshot.updated_at
        return same and bool(self.fields.keys() - set(self.snapshot.kind.state))

    @property
    def expects_webhook(self) -> bool:
        """
        Whether a webhook must have announced what is newer in the snapshot.

        Clerk has no event for a change of the account state, and may move ``updated_at`` for fields
        that are not stored. After a tombstone, the user's webhooks may have come long ago.
        """
        if self.row is None:
            return True
        if self.row.deleted_at is not None or not self.fields.keys() - set(ACCOUNT):
            return False
        return (self.row.version_updated_at or 0) < self.snapshot.updated_at

    @cached_property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """
        The stored value and Clerk's value of each column that differs.

        The times of the account state may differ, because Clerk's data contains only the state.
        """
        if self.row is None:
            return {}
        pairs = {name: (getattr(self.row, name), self.values[name]) for name in self.values}
        return {name: pair for name, pair in pairs.items() if self._differs(name, *pair)}

    def _differs(self, name: str, here: Any, clerk: Any) -> bool:
        if name in self.snapshot.kind.fixed and clerk is None:
            return False
        if name not in ACCOUNT:
            return bool(here != clerk)
        now = datetime.now(UTC)
        return _holds(name, here, now) != _holds(name, clerk, now)

    @property
    def result(self) -> Result:
        """The expected result of writing the snapshot, if no webhook writes newer data first."""
        if self.row is None:
            return Result.CREATED
        if self.kind == "differs" and not self.fields:
            return Result.UNCHANGED
        if self.is_behind or self.lacks_declared:
            return Result.UPDATED
        return Result.UNCHANGED if self.is_edited else Result.NEWER_HERE


def _holds(name: str, at: datetime | None, now: datetime) -> bool:
    """Return whether the account state in the column *name* holds at the time *now*."""
    return at is not None and (name != "locked_until" or at > now)
