"""The progress of the follower, which it stores with its lease."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from clerkhooks.store import Store
from clerkhooks.store.leases import Held

FOLLOWER = "follower"
"""The name of the follower's lease."""
WITHHELD = "deletions_withheld"


@dataclass(frozen=True)
class Progress:
    """
    What has been read from Clerk. Times are in milliseconds.

    All users whose ``updated_at`` is at most *position* are stored. Before the first position is
    known, the import has reached the user with the id *imported_to*. The sweep has reached the id
    *swept_to* of *users* users. It has written *deleted* tombstones since *deleted_since*, and
    withheld others in this pass (*withholds*) or in the last one (*withheld*). Webhooks were
    delayed until *troubled_at*. *error* is the reason why the last round is incomplete.
    """

    position: int | None = None
    imported_to: str | None = None
    swept_to: str | None = None
    users: int = 0
    deleted_since: int = 0
    deleted: int = 0
    withholds: bool = False
    withheld: bool = False
    troubled_at: int = 0
    error: str | None = None

    @classmethod
    def of(cls, held: Held) -> Self:
        """Return the stored progress. Ignore what another release has stored."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in held.state.items() if name in names})

    @property
    def state(self) -> dict[str, Any]:
        """The progress in the form in which it is stored."""
        return asdict(self)

    @property
    def fault(self) -> str | None:
        """The reason that operators are told, or None if all is well."""
        return self.error or (WITHHELD if self.withholds or self.withheld else None)


def find_progress(store: Store) -> tuple[Held, Progress] | None:
    """Return the stored progress, or None if no follower has ever run."""
    held = store.leases.find(FOLLOWER)
    return None if held is None else (held, Progress.of(held))
