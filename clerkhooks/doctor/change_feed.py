"""Checks of the change feed and of its durable handlers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from clerkhooks.doctor.findings import Finding, Level, count
from clerkhooks.errors import ChangesRestored
from clerkhooks.store import Store
from clerkhooks.store.change_reader import ChangeReader
from clerkhooks.sync.change_handlers import PREFIX, find_handlers

MAX_DELAY = 60.0  # seconds


def judge_changes(store: Store, durable: Iterable[str] = ()) -> Iterator[Finding]:
    """Check the change feed, if there is one: its readers, its delay and its handlers."""
    if store.changes is None:
        return
    reader, subject = ChangeReader(store), "change feed"
    try:
        reader.read(None, 1)
    except ChangesRestored as error:
        what, _, remedy = str(error).partition(". ")
        yield Finding(error.reason, Level.ERROR, subject, f"{what}.", remedy)
        return
    yield from _judge_handlers(store)
    yield from _find_idle_handlers(store, durable)
    delay = reader.find_delay()
    if delay < MAX_DELAY:
        yield Finding("changes_readable", Level.OK, subject, "Readers see all changes.")
        return
    what = f"Readers cannot see changes of the last {delay:,.0f} s: a transaction is still running."
    remedy = (
        "Find it: SELECT * FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start"
    )
    yield Finding("changes_delayed", Level.WARNING, subject, what, remedy)


def _judge_handlers(store: Store) -> Iterator[Finding]:
    """Report durable handlers that fail."""
    for handler in find_handlers(store):
        position = handler.position
        if position.failures:
            attempts = count(position.failures, "time")
            what = f"The handler {handler.name} failed {attempts} ({position.error})."
            remedy = (
                "The log event round_failed has the stack frames. If the handler was removed from "
                f"the application, delete the row {PREFIX}{handler.name} of clerk_leases."
            )
            yield Finding("change_handler_failing", Level.ERROR, "change feed", what, remedy)


def _find_idle_handlers(store: Store, durable: Iterable[str]) -> Iterator[Finding]:
    """Report handlers whose lease no process holds, perhaps because a call hangs."""
    for name in durable:
        if not store.leases.is_held(f"{PREFIX}{name}"):
            what = f"No process calls the handler {name}, or a call of it hangs."
            remedy = "Keep this command running: flask clerk changes --run-handlers"
            yield Finding("change_handler_not_running", Level.WARNING, "change feed", what, remedy)
