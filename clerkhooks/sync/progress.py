"""The progress of the follower, which it stores with its lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from clerkhooks.clerk.kinds import Kind
from clerkhooks.store import Store
from clerkhooks.store.leases import Held, known_fields

FOLLOWER = "follower"
"""The name of the follower's lease."""
WITHHELD = "deletions_withheld"


@dataclass(frozen=True)
class Deletions:
    """
    The deletions in one table: *count* since the time *since* (milliseconds).

    Others were withheld in this pass over all objects (*withholds*) or in the last (*withheld*).
    """

    since: int = 0
    count: int = 0
    withholds: bool = False
    withheld: bool = False

    @property
    def is_withheld(self) -> bool:
        """Whether an operator must decide."""
        return self.withholds or self.withheld


@dataclass(frozen=True)
class Progress:
    """
    What has been read from Clerk. Times are in milliseconds.

    All users whose ``updated_at`` is at most *position* are stored. Before the first position is
    known, the import has reached the user with the id *imported_to*, and *imported_at* is the
    position at which it began. The position was found at the time *moved_at*, and if it
    *is_settled*, the changes before it have been read again since. The sweep has reached the id
    *swept_to* of *users* users. *passed* has the families of objects of which all pages have been
    read once, *offsets* the positions in their lists, and *deletions* the deletions by family. The
    users *failed* could not be written, so each round reads them again. Overdue webhooks were
    searched for at *watched_at*. Webhooks were delayed until *troubled_at*. *error* is the reason
    why the last round is incomplete.
    """

    position: int | None = None
    moved_at: int = 0
    is_settled: bool = False
    imported_to: str | None = None
    imported_at: int | None = None
    swept_to: str | None = None
    users: int = 0
    passed: Sequence[str] = ()
    offsets: Mapping[str, int] = field(default_factory=dict)
    failed: Sequence[str] = ()
    deletions: Mapping[str, Deletions] = field(default_factory=dict)
    watched_at: int = 0
    troubled_at: int = 0
    error: str | None = None

    @classmethod
    def of(cls, held: Held) -> Self:
        """Return the stored progress. Ignore what another release has stored."""
        stored = known_fields(cls, held.state)
        deletions = stored.get("deletions", {}).items()
        stored["deletions"] = {
            family: Deletions(**known_fields(Deletions, each)) for family, each in deletions
        }
        return cls(**stored)

    @property
    def state(self) -> dict[str, Any]:
        """The progress in the form in which it is stored."""
        return asdict(self)

    @property
    def fault(self) -> str | None:
        """The reason that is reported to operators, or None."""
        is_withheld = any(each.is_withheld for each in self.deletions.values())
        return self.error or (WITHHELD if is_withheld else None)

    def deletions_of(self, kind: Kind) -> Deletions:
        """Return the deletions of objects of *kind*."""
        return self.deletions.get(kind.family, Deletions())

    def with_deletions(self, kind: Kind, deletions: Deletions) -> Self:
        """Return the progress with other deletions of objects of *kind*."""
        return replace(self, deletions={**self.deletions, kind.family: deletions})


def find_progress(store: Store) -> tuple[Held, Progress] | None:
    """Return the stored progress, or None if no follower has ever run."""
    held = store.leases.find(FOLLOWER)
    return None if held is None else (held, Progress.of(held))
