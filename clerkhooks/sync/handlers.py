"""Users whose account state a sync changes, while handlers follow such changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import sqlalchemy as sa

from clerkhooks.errors import describe
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.sync.comparison import Comparison, Finding, Result
from clerkhooks.sync.connections import check_lock, retry


def write_told(
    handled: HandledWrites,
    connection: sa.Connection,
    comparisons: Iterable[Comparison],
    tell: Callable[[Finding], object],
) -> Iterator[Result]:
    """
    Write each user in one transaction with the handlers, and yield the result.

    If a handler fails, nothing is written, *tell* receives the error, and the sync continues.
    *connection* is the sync's own connection.
    """
    for each in comparisons:
        check_lock(connection)
        try:
            read_at = each.snapshot.read_at
            is_written = retry(handled.store_snapshot, each.event, each.new_row, read_at)
        except Exception as error:  # noqa: BLE001  # an application's handler may raise anything
            tell(Finding("handler_failed", each.snapshot.id, describe(error)))
            yield Result.FAILED
        else:
            yield each.result if is_written else Result.NEWER_HERE
