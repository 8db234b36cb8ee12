"""The command ``changes``, which lists and follows the change feed."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click
import sqlalchemy as sa
from flask import Flask, current_app
from flask.cli import with_appcontext
from sqlalchemy.exc import OperationalError

from clerkhooks.cli.follow import Interruption, interrupts, print_event, print_event_json
from clerkhooks.cli.options import (
    CannotDo,
    as_object,
    database_failures,
    json_lines_option,
    limit_option,
    print_reports,
    printable,
)
from clerkhooks.errors import ChangesPruned, ChangesRestored, describe
from clerkhooks.store import Store
from clerkhooks.store.change_reader import MAX_LIMIT, Change, ChangeReader, Cursor
from clerkhooks.store.changes import CHANNEL
from clerkhooks.store.postgresql import TimeoutConnection
from clerkhooks.sync.lease import stop_all
from clerkhooks.web.background import make_handler_loops, run_loop
from clerkhooks.web.state import current_state

COLUMNS = ("changed_at", "kind", "object_type", "object_id", "fields", "cursor")
POLL = 1.0  # seconds
STOP_TIMEOUT = 2.0  # seconds for a loop that is stopped; Docker kills a process after 10 seconds


@click.command()
@click.option("--after", metavar="CURSOR", help="Only changes after this cursor. 'end': new ones.")
@limit_option
@click.option("--follow", is_flag=True, help="Keep printing new changes until Ctrl-C.")
@click.option("--run-handlers", is_flag=True, help="Call durable handlers until Ctrl-C.")
@json_lines_option
@with_appcontext
def changes(after: str | None, limit: int, follow: bool, run_handlers: bool, as_json: bool) -> None:
    """
    List the changes of users, organizations and memberships, oldest first.

    Needs CLERK_TABLES=changes. A change names the columns that changed, and contains no values. To
    continue later, pass the cursor of the last change that you have processed to --after. With
    --follow, --limit is the size of the first page.

    With --run-handlers, the command calls the handlers that the application registered with
    durable=True, and prints failures. No other process calls them. If several processes run this
    command, one of them calls each handler.

    Exit status: 0, or 2 if changes after the cursor were pruned.
    """
    store = current_state().store
    if store.changes is None:
        raise CannotDo("The change feed is off. Set CLERK_TABLES=changes.")
    if run_handlers:
        _run_handlers(as_json)
        return
    reader = ChangeReader(store)
    with database_failures(), suppress(KeyboardInterrupt), _feed_failures():
        cursor = _find_cursor(reader, after)
        found = reader.read(cursor, limit)
        _print(found, as_json, with_names=True)
        if not found and not follow and not as_json:
            click.echo("No changes found.")
        if follow:
            cursor = Cursor.parse(found[-1].cursor) if found else cursor
            interruption = Interruption()
            with interrupts(interruption.note):
                for page in _follow(store, reader, cursor, interruption):
                    _print(page, as_json, with_names=False)


def _run_handlers(as_json: bool) -> None:
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    loops = make_handler_loops(app, print_event_json if as_json else print_event)
    if not loops:
        raise CannotDo("No handler is registered with durable=True.")
    threads = [threading.Thread(target=run_loop, args=(app, loop), daemon=True) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        interruption = Interruption()
        with interrupts(interruption.note):
            while not interruption.has_arrived:
                time.sleep(POLL)
    finally:
        stop_all(loops)
    ends_at = time.monotonic() + STOP_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, ends_at - time.monotonic()))


def _find_cursor(reader: ChangeReader, after: str | None) -> Cursor | None:
    if after is None:
        return None
    if after == "end":
        return reader.find_end()
    try:
        return Cursor.parse(after)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--after") from None


@contextmanager
def _feed_failures() -> Iterator[None]:
    try:
        yield
    except (ChangesPruned, ChangesRestored) as error:
        raise CannotDo(str(error)) from None


def _follow(
    store: Store, reader: ChangeReader, cursor: Cursor | None, interruption: Interruption
) -> Iterator[list[Change]]:
    """
    Yield new changes: after a notification where possible, and otherwise once a second.

    While the database is unavailable, try again.
    """
    while not interruption.has_arrived:
        try:
            for found in _listen(store, reader, cursor, interruption):
                cursor = Cursor.parse(found[-1].cursor)
                yield found
        except OperationalError as error:
            click.echo(f"Database error ({describe(error)}). Trying again.", err=True)
            time.sleep(POLL)


def _listen(
    store: Store, reader: ChangeReader, cursor: Cursor | None, interruption: Interruption
) -> Iterator[list[Change]]:
    with _waiting(store) as wait:
        while not interruption.has_arrived:
            found = reader.read(cursor, MAX_LIMIT)
            if found:
                cursor = Cursor.parse(found[-1].cursor)
                yield found
            else:
                wait()


@contextmanager
def _waiting(store: Store) -> Iterator[Callable[[], object]]:
    """
    Yield a function that waits for a notification, for at most a second.

    A pooler in transaction mode loses notifications, and a standby has none. Changes are also
    visible later than their notification if another transaction is still running.
    """
    with store.database.connect() as connection:
        driver = connection.connection.driver_connection
        is_pooled = current_state().settings.pooler is not None
        if is_pooled or not isinstance(driver, TimeoutConnection) or _is_standby(connection):
            yield lambda: time.sleep(POLL)
            return
        connection.detach()
        driver.add_notify_handler(lambda _: None)  # otherwise, notifications pile up
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")

        def wait() -> None:
            if select.select([driver], [], [], POLL)[0]:
                connection.execute(sa.text("SELECT 1"))  # reads the notifications

        yield wait


def _is_standby(connection: sa.Connection) -> bool:
    return bool(connection.scalar(sa.text("SELECT pg_is_in_recovery()")))


def _print(found: list[Change], as_json: bool, *, with_names: bool) -> None:
    if as_json:
        for change in found:
            click.echo(json.dumps(as_object(change)))
    elif found and with_names:
        print_reports(COLUMNS, found)
    else:
        for change in found:
            click.echo("  ".join(printable(getattr(change, name)) for name in COLUMNS))
