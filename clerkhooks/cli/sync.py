"""``sync``: bring the table to what Clerk has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from flask.cli import with_appcontext

from clerkhooks.clerk.events import is_user_id
from clerkhooks.cli.options import CannotDo, database_failures
from clerkhooks.cli.progress import Progress
from clerkhooks.errors import BackendApiError
from clerkhooks.settings import VARIABLES
from clerkhooks.web.state import current_state

if TYPE_CHECKING:
    from clerkhooks.sync.reconcile import Finding, Reconciliation

_WHAT = {
    "missing_here": "is at Clerk and has no row here",
    "unfilled_here": "has a row that nothing has filled in",
    "deleted_here": "is deleted here since a sync did not find it, and is at Clerk again",
    "differs": "differs",
    "gone_at_clerk": "is here and no longer at Clerk",
}


@click.command()
@click.argument("user_ids", nargs=-1, metavar="[USER_ID]...")
@click.option(
    "--check",
    is_flag=True,
    help="Change nothing; report what is other here than at Clerk: status 1 if anything is.",
)
@click.option("--missing", is_flag=True, help="Only rows that nothing has filled in yet.")
@click.option(
    "--failed",
    is_flag=True,
    help="Only users of messages that failed and were never retried to success.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Delete also when more than a tenth of all users, and more than 20, are gone, or all are.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object a line: each finding, with its fields, then the summary.",
)
@click.pass_context
@with_appcontext
def sync(
    context: click.Context,
    user_ids: tuple[str, ...],
    check: bool,
    missing: bool,
    failed: bool,
    force: bool,
    as_json: bool,
) -> None:
    """
    Bring users to what Clerk has, through the Backend API: all of them, or those named.

    For the first installation, after an outage, and from time to time to be sure. Webhooks and
    calls may go on meanwhile: what is fresher here stays, and a user whom Clerk said to be deleted
    is not revived. It may be interrupted at any moment and run again. Needs CLERK_SECRET_KEY.

    Status: 0 if the table is as Clerk has it, 1 if a user could not be read, deletions were
    withheld, a named user is unknown or --check found a difference, 2 if it could not be done.
    """
    if (bool(user_ids) + missing + failed) > 1:
        raise click.UsageError("Name users, or give --missing or --failed: one of them.")
    if wrong := [user_id for user_id in user_ids if not is_user_id(user_id)]:
        raise click.UsageError(f"{wrong[0]!r} is not a Clerk user id, such as user_2abcDEF….")
    output = Output(as_json)
    with _failures(), _begun(output, check=check, force=force) as run:
        if user_ids:
            run.sync_some(user_ids)
        elif missing:
            run.sync_missing()
        elif failed:
            run.sync_failed()
        else:
            run.sync_all()
    context.exit(0 if run.well and not (user_ids and run.unknown) else 1)


class Output:
    """Findings as they come, then the summary: on stdout, as text or as one JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._began = time.monotonic()
        self.ended = False

    def tell(self, finding: Finding) -> None:
        """One finding. The values of fields are profile data: only JSON, which was asked for, has them."""
        if self._as_json:
            fields = {
                name: {"here": here, "clerk": clerk}
                for name, (here, clerk) in finding.fields.items()
            }
            self._line(
                {
                    "kind": finding.kind,
                    "id": finding.user_id,
                    "reason": finding.reason,
                    "fields": fields,
                }
            )
            return
        what = (
            f"could not be read: {finding.reason}"
            if finding.kind == "failed"
            else _WHAT[finding.kind]
        )
        names = f": {', '.join(finding.fields)}" if finding.fields else ""
        click.echo(f"{finding.user_id or 'A user without an id'} {what}{names}")

    def summarize(self, run: Reconciliation) -> None:
        """What became of all of them."""
        counts = run.summary()
        if self._as_json:
            drift = {"drift": run.drifted} if run.check else {}
            self._line(
                {
                    "summary": counts
                    | drift
                    | {"withheld": run.withheld, "well": run.well and self.ended}
                }
            )
            return
        took = time.monotonic() - self._began
        verb = ("Compared" if run.check else "Synced") if self.ended else "Stopped after"
        would = " A sync would make of them:" if run.check else ""
        click.echo(f"{verb} {sum(counts.values()):,} users in {took:,.1f} s.{would}")
        for name, count in counts.items():
            click.echo(f"  {name.replace('_', ' '):<13}{count:>12,}")
        if run.check:
            click.echo(
                f"{run.drifted:,} of them differ from what Clerk has."
                if run.drifted
                else "Nothing differs from what Clerk has."
            )
        if run.withheld:
            click.echo(
                f"At least {run.withheld:,} rows have no user at Clerk. So many at once are rather the sign of a wrong CLERK_SECRET_KEY, "
                "so none was deleted. If they are really gone: --force",
                err=True,
            )

    @staticmethod
    def _line(value: object) -> None:
        click.echo(json.dumps(value))


@contextmanager
def _begun(output: Output, *, check: bool, force: bool) -> Iterator[Reconciliation]:
    """A run that is summarized in the end, however it ends."""
    from clerkhooks.clerk.backend_api import (
        BackendApi,
    )  # with all that they need, only where they are needed
    from clerkhooks.sync.reconcile import Reconciliation, reader, sole_writer

    state = current_state()
    settings, store = state.settings, state.store
    if settings.secret_key is None:
        raise CannotDo(f"CLERK_SECRET_KEY is not set.\n{VARIABLES['CLERK_SECRET_KEY']}")
    api = BackendApi(settings.api_url, settings.secret_key)
    connecting = reader(store) if check else sole_writer(store)
    with api, Progress() as progress, connecting as connection:
        run = Reconciliation(api, store, connection, progress, output.tell, check, force)
        try:
            yield run
            output.ended = True
        finally:
            progress.end()
            output.summarize(run)


@contextmanager
def _failures() -> Iterator[None]:
    """Whatever ends a run early, in words."""
    from clerkhooks.sync.reconcile import AlreadyRunning

    try:
        with database_failures():
            yield
    except AlreadyRunning:
        raise CannotDo(
            "Another sync is at work on this database. Wait for its end; a second one would only do the same."
        ) from None
    except BackendApiError as error:
        raise CannotDo(f"{error}\nWhat was done stays; run it again to go on.") from None
    except KeyboardInterrupt:
        raise CannotDo("Interrupted. What was done stays; run it again to go on.") from None
