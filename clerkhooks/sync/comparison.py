"""Comparison of a stored row with a user of the Backend API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from clerkhooks.clerk.events import Snapshot
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.statements import PROFILE


class Result(StrEnum):
    """The result for one user."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    FRESHER_HERE = "fresher_here"
    TOMBSTONED = "tombstoned"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    A user that differs from Clerk, or could not be compared.

    *kind* is ``missing_here``, ``unfilled_here``, ``deleted_here``, ``differs``, ``gone_at_clerk``
    or ``failed``. *fields* has the value here and the value at Clerk of each field that differs.
    These are profile data, so they must not be logged.
    """

    kind: str
    user_id: str | None
    reason: str | None = None
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)


def judge(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> tuple[Result, bool]:
    """
    Return the result of *snapshot* for the stored *row* or None, and whether it must be written.

    *values* are those of the snapshot's columns.
    """
    if row is None:
        return Result.CREATED, True
    if row.deleted_at is not None:
        is_final = row.version_updated_at is None
        return (Result.FRESHER_HERE, False) if is_final else (Result.UPDATED, True)
    if row.version_updated_at is None:
        return Result.UPDATED, True
    is_same = not find_differences(row, values)
    if tuple(getattr(row, name) for name in VERSION_COLUMNS) >= snapshot.version:
        return Result.UNCHANGED if is_same else Result.FRESHER_HERE, False
    # The version is written even if nothing else changes: a late event between the two versions
    # must not win afterwards.
    return Result.UNCHANGED if is_same else Result.UPDATED, True


def lacks_declared(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> bool:
    """Return whether *row* is as new as *snapshot*, but older than a declared column."""
    if row.deleted_at is not None or row.version_updated_at != snapshot.updated_at:
        return False
    return any(
        value is not None and getattr(row, name) is None
        for name, value in values.items()
        if name not in PROFILE
    )


def find_drift(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> Finding:
    """Return how *row* differs from *snapshot*, whose columns have *values*."""
    if row is None:
        return Finding("missing_here", snapshot.user_id)
    kind = "differs"
    if row.deleted_at is not None:
        kind = "deleted_here"
    elif row.version_updated_at is None:
        kind = "unfilled_here"
    return Finding(kind, snapshot.user_id, fields=find_differences(row, values))


def find_differences(row: Any, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the stored and the new value of each column that differs."""
    pairs = {name: (getattr(row, name), value) for name, value in values.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
