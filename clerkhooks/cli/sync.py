"""The ``sync`` command, which updates the tables from Clerk."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from datetime import time as time_of_day
from functools import cache, partial
from itertools import repeat

import click
from flask.cli import with_appcontext

from clerkhooks.clerk.backend_api import RETRY_TIMEOUT, BackendApi
from clerkhooks.cli.follow import follow as follow_clerk
from clerkhooks.cli.options import CannotDo, database_failures, json_lines_option, parse_object_id
from clerkhooks.errors import BackendApiError
from clerkhooks.settings import VARIABLES
from clerkhooks.sync.comparison import Finding
from clerkhooks.sync.connections import AlreadyRunning, reader, sole_writer
from clerkhooks.sync.reconcile import Reconciliation
from clerkhooks.sync.tables import TableSync
from clerkhooks.web.state import current_state

_CONTINUE = "Changes made so far are kept. To continue, run the command again."
_FINDINGS = {
    "missing_here": "is missing from the database",
    "unfilled_here": "has no profile in the database",
    "deleted_here": "was deleted by an earlier sync, but exists at Clerk again",
    "differs": "differs",
    "gone_at_clerk": "no longer exists at Clerk",
    "failed": "could not be read",
    "unconfirmed": "is not listed by Clerk, but Clerk does not confirm its deletion",
    "handler_failed": "was not updated, because a handler failed",
}


@click.command()
@click.argument("ids", nargs=-1, type=parse_object_id, metavar="[ID]...")
@click.option("--check", is_flag=True, help="Report differences and change nothing.")
@click.option("--missing", is_flag=True, help="Only users without a profile.")
@click.option("--failed", is_flag=True, help="Only objects whose messages failed.")
@click.option("--force", is_flag=True, help="Delete objects even if many are missing from Clerk.")
@click.option("--follow", is_flag=True, help="Keep running, and update objects as they change.")
@json_lines_option
@click.pass_context
@with_appcontext
def sync(
    context: click.Context,
    ids: tuple[str, ...],
    check: bool,
    missing: bool,
    failed: bool,
    force: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """
    Update the tables, or the objects with the given ids, from Clerk's Backend API.

    Run this command after installation, after an outage, and on a schedule. Webhooks and API calls
    may continue during a sync: newer data is kept, and a user deleted by a webhook stays deleted.
    You can interrupt a sync at any time and run it again. CLERK_SECRET_KEY is required.

    The objects are users and, with CLERK_TABLES=organizations, organizations and memberships. An ID
    begins with user_, org_ or orgmem_. A membership that is not in the table is searched for in
    Clerk's list of all memberships.

    Without --force, nothing is deleted if all of the newest users are missing from Clerk, or if
    more than 20 rows and more than a tenth of a table are missing. With --json, findings include
    the values of fields, and the summary is the last line.

    With --follow, the command runs until it is interrupted. It reads the latest changes about once
    a minute (CLERK_FOLLOW), and asks Clerk for every user within a day. Of all processes that
    follow, the service's workers included, one works and the others wait. --json prints one object
    per event.

    Exit status: 0 if the tables match Clerk; 1 if an object could not be read, a handler failed,
    deletions require --force, a given id is unknown, or --check found a difference; 2 if the sync
    could not run.
    """
    if (bool(ids) + missing + failed) > 1:
        raise click.UsageError("Use only one of ids, --missing and --failed.")
    if follow:
        if ids or missing or failed or check or force:
            raise click.UsageError("Use --follow without ids or other options, except --json.")
        _require_key()
        follow_clerk(as_json)
        context.exit(0)
    _check_kept(ids)
    with _failures(), _reconciliation(as_json, check, force) as run:
        if ids:
            run.sync_some(ids)
        elif missing:
            run.sync_missing()
        elif failed:
            run.sync_failed()
        else:
            run.sync_all()
    context.exit(0 if run.ok and not (ids and run.unknown) else 1)


def _check_kept(ids: Sequence[str]) -> None:
    """Raise UsageError if an id is not of a kind whose table is kept."""
    kinds = current_state().store.by_kind
    if unkept := [each for each in ids if not any(kind.is_id(each) for kind in kinds)]:
        raise click.UsageError(f"{unkept[0]} is not kept without CLERK_TABLES=organizations.")


def _print_finding(finding: Finding) -> None:
    """Print a finding, but not the values of fields, which are profile data."""
    subject = (
        finding.id or f"{'An' if finding.noun[0] == 'o' else 'A'} {finding.noun} without an id"
    )
    text = f"{subject} {_FINDINGS[finding.kind]}"
    details = finding.reason or ", ".join(finding.fields)
    click.echo(f"{text}: {details}" if details else text)


def _print_json(finding: Finding) -> None:
    pairs = finding.fields.items()
    fields = {name: {"here": here, "clerk": clerk} for name, (here, clerk) in pairs}
    about = {"kind": finding.kind, "object": finding.noun, "id": finding.id}
    told = about | {"reason": finding.reason, "fields": fields}
    click.echo(json.dumps(told, default=_plain))


def _plain(value: object) -> str:
    """Format a value that JSON lacks. Times are formatted as ISO 8601."""
    return value.isoformat() if isinstance(value, date | time_of_day) else str(value)


def _print_summary(run: Reconciliation, finished: bool, seconds: float) -> None:
    verb = ("Compared" if run.check else "Synced") if finished else "Stopped after"
    would = " A sync would result in:" if run.check else ""
    for table in run.tables:
        counts = table.summary()
        took = f" in {seconds:,.1f} s" if table is run.users else ""
        click.echo(f"{verb} {sum(counts.values()):,} {table.noun}{took}.{would}")
        for name, count in counts.items():
            click.echo(f"  {name.replace('_', ' '):<13}{count:>12,}")
        if run.check:
            click.echo(f"{table.noun.capitalize()} that differ from Clerk: {table.drifted:,}")
        if table.withheld:
            click.echo(
                f"Nothing was deleted: at least {table.withheld:,} {table.noun} no longer exist at "
                "Clerk, which usually means that CLERK_SECRET_KEY is wrong. To delete them: "
                "--force",
                err=True,
            )


def _print_json_summary(run: Reconciliation, finished: bool) -> None:
    summary: dict[str, object] = {**_figures(run.users, check=run.check)}
    for table in run.tables[1:]:
        summary[table.noun] = _figures(table, check=run.check)
    click.echo(json.dumps({"summary": summary | {"ok": run.ok and finished}}))


def _figures(table: TableSync, *, check: bool) -> dict[str, int]:
    drift = {"drift": table.drifted} if check else {}
    return table.summary() | drift | {"withheld": table.withheld}


def _require_key() -> str:
    key = current_state().settings.secret_key
    if key is None:
        raise CannotDo(f"CLERK_SECRET_KEY is not set.\n{VARIABLES['CLERK_SECRET_KEY']}")
    return key


@contextmanager
def _reconciliation(as_json: bool, check: bool, force: bool) -> Iterator[Reconciliation]:
    """Yield a reconciliation. At the end, print its summary, even after an error."""
    state = current_state()
    settings, store = state.settings, state.store
    tell = _print_json if as_json else _print_finding
    began, finished = time.monotonic(), False
    report = cache(_report_retry)  # once for each kind of error
    api = BackendApi(settings.api_url, _require_key(), on_retry=report)
    connecting = reader(store) if check else sole_writer(store)
    with api, ExitStack() as bars, connecting as connection:
        begin = partial(_begin, bars)
        run = Reconciliation(
            api, store, connection, begin, tell, check, force, state.deliveries.handled
        )
        # Otherwise, garbage collection would scan imported modules for each page: 7 µs per user.
        gc.freeze()
        try:
            yield run
            finished = True
        finally:
            gc.unfreeze()
            bars.close()
            if as_json:
                _print_json_summary(run, finished)
            else:
                _print_summary(run, finished, time.monotonic() - began)


def _report_retry(what: str) -> None:
    """Print why the sync is waiting."""
    over_bar = "\r\x1b[K" if sys.stderr.isatty() else ""
    minutes = f"{RETRY_TIMEOUT / 60:.0f} minutes"
    click.echo(f"{over_bar}Clerk's Backend API {what}. Retrying for up to {minutes}.", err=True)


def _begin(bars: ExitStack, label: str, total: int | None) -> Callable[[int], None]:
    """Replace the progress bar with a new one. Without a terminal, print a line instead."""
    bars.close()
    bar = click.progressbar(repeat(None), total, label, file=sys.stderr, show_pos=True)
    return bars.enter_context(bar).update


@contextmanager
def _failures() -> Iterator[None]:
    """Raise CannotDo for an error that stops a sync."""
    try:
        with database_failures():
            yield
    except AlreadyRunning:
        raise CannotDo("Another sync is running. Wait until it has finished.") from None
    except BackendApiError as error:
        raise CannotDo(f"{error}\n{_CONTINUE}") from None
    except KeyboardInterrupt:
        raise CannotDo(f"Interrupted. {_CONTINUE}") from None
