"""Comparison of a user from the Backend API with the stored row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from clerkhooks.clerk.events import Snapshot
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.statements import PROFILE


class Result(StrEnum):
    """The result of a sync for one user."""

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
    A user whose row differs from Clerk's data or could not be compared.

    *kind* is ``missing_here``, ``unfilled_here``, ``deleted_here``, ``differs``, ``gone_at_clerk``
    or ``failed``. *fields* maps the name of each field that differs to its stored value and its
    value at Clerk. The values are profile data and must not be logged.
    """

    kind: str
    user_id: str | None
    reason: str | None = None
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, repr=False)
class Comparison:
    """A user from Clerk, the *values* to store, and the stored *row* (None if missing)."""

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
    def is_behind(self) -> bool:
        """Whether the row is missing, or older than the snapshot."""
        if self.row is None:
            return True
        version = tuple(getattr(self.row, name) for name in VERSION_COLUMNS)
        if version[0] is None:  # no profile yet, or a tombstone from user.deleted, which is final
            return self.row.deleted_at is None
        return self.row.deleted_at is not None or version < self.snapshot.version

    @property
    def lacks_declared(self) -> bool:
        """Whether the row has the snapshot's version and an unfilled declared column."""
        if self.is_behind or self.row.version_updated_at != self.snapshot.updated_at:
            return False
        return any(self.fields[name][0] is None for name in self.fields.keys() - set(PROFILE))

    @property
    def is_edited(self) -> bool:
        """Whether the row differs but has Clerk's version. A sync does not overwrite such a row."""
        same = self.row is not None and self.row.version_updated_at == self.snapshot.updated_at
        return same and bool(self.fields)

    @cached_property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """The stored value and Clerk's value of each column that differs."""
        if self.row is None:
            return {}
        pairs = {name: (getattr(self.row, name), self.values[name]) for name in self.values}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

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
