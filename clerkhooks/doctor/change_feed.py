"""Whether readers of the change feed see new changes."""

from __future__ import annotations

from collections.abc import Iterator

from clerkhooks.doctor.findings import Finding, Level
from clerkhooks.errors import ChangesRestored
from clerkhooks.store import Store
from clerkhooks.store.change_reader import ChangeReader

MAX_DELAY = 60.0  # seconds


def judge_changes(store: Store) -> Iterator[Finding]:
    """Check that readers of the change feed, if there is one, see new changes."""
    if store.changes is None:
        return
    reader, subject = ChangeReader(store), "change feed"
    try:
        reader.read(None, 1)
    except ChangesRestored as error:
        what, _, remedy = str(error).partition(". ")
        yield Finding(error.reason, Level.ERROR, subject, f"{what}.", remedy)
        return
    delay = reader.find_delay()
    if delay < MAX_DELAY:
        yield Finding("changes_readable", Level.OK, subject, "Readers see all changes.")
        return
    what = f"Readers cannot see changes of the last {delay:,.0f} s: a transaction is still running."
    remedy = (
        "Find it: SELECT * FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start"
    )
    yield Finding("changes_delayed", Level.WARNING, subject, what, remedy)
