"""``sync``: make the tables match Clerk."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import click
from flask.cli import with_appcontext

from clerkhooks.clerk.events import is_user_id
from clerkhooks.cli.options import CannotDo, database_failures
from clerkhooks.errors import BackendApiError
from clerkhooks.settings import VARIABLES
from clerkhooks.web.state import current_state

if TYPE_CHECKING:
    from clerkhooks.sync.comparison import Finding
    from clerkhooks.sync.reconcile import Reconciliation

_CONTINUE = "Changes made so far are kept. To continue, run the command again."
_FINDINGS = {
    "missing_here": "is missing from the database",
    "unfilled_here": "has no profile in the database",
    "deleted_here": "was deleted by an earlier sync, and exists at Clerk again",
    "differs": "differs",
    "gone_at_clerk": "no longer exists at Clerk",
    "failed": "could not be read",
}


@click.command()
@click.argument("user_ids", nargs=-1, metavar="[USER_ID]...")
@click.option(
    "--check", is_flag=True, help="Report differences and change nothing: status 1 if any exist."
)
@click.option("--missing", is_flag=True, help="Only users whose row has no profile yet.")
@click.option(
    "--failed",
    is_flag=True,
    help="Only users of messages that failed and were not processed since.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Delete even if more than a tenth of all users, and more than 20, or all are gone.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per line: each finding with its fields, then the summary.",
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
    Update all users, or the named ones, from Clerk's Backend API.

    Use it after the installation, after an outage, and on a schedule. Webhooks and API calls may
    continue meanwhile: newer data is kept, and a user deleted by Clerk's webhook stays deleted. You
    can interrupt it at any time and run it again. Needs CLERK_SECRET_KEY.

    Exit status: 0 if the tables match Clerk; 1 if a user could not be read, deletions were
    withheld, a named user is unknown, or --check found a difference; 2 if the sync could not run.
    """
    if (bool(user_ids) + missing + failed) > 1:
        raise click.UsageError("Use only one of user ids, --missing and --failed.")
    if wrong := [user_id for user_id in user_ids if not is_user_id(user_id)]:
        raise click.UsageError(f"{wrong[0]!r} is not a Clerk user id, such as user_2abcDEF….")
    with _failures(), _reconciliation(Output(as_json), check=check, force=force) as run:
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
    """Print findings as they arrive, then a summary: text, or one JSON object per line."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._began = time.monotonic()

    def tell(self, finding: Finding) -> None:
        """Print a finding. Text leaves out the values of fields, which are profile data."""
        if self._as_json:
            fields = {
                name: {"here": here, "clerk": clerk}
                for name, (here, clerk) in finding.fields.items()
            }
            ids = {"kind": finding.kind, "id": finding.user_id, "reason": finding.reason}
            click.echo(json.dumps(ids | {"fields": fields}))
            return
        details = finding.reason or ", ".join(finding.fields)
        subject = finding.user_id or "A user without an id"
        text = f"{subject} {_FINDINGS[finding.kind]}"
        click.echo(f"{text}: {details}" if details else text)

    def summarize(self, run: Reconciliation, *, finished: bool) -> None:
        """Print how many users had which result."""
        if self._as_json:
            drift = {"drift": run.drifted} if run.check else {}
            state = {"withheld": run.withheld, "well": run.well and finished}
            click.echo(json.dumps({"summary": run.summary() | drift | state}))
        else:
            self._print_summary(run, finished)

    def _print_summary(self, run: Reconciliation, finished: bool) -> None:
        counts, took = run.summary(), time.monotonic() - self._began
        verb = ("Compared" if run.check else "Synced") if finished else "Stopped after"
        would = " A sync would give:" if run.check else ""
        click.echo(f"{verb} {sum(counts.values()):,} users in {took:,.1f} s.{would}")
        for name, count in counts.items():
            click.echo(f"  {name.replace('_', ' '):<13}{count:>12,}")
        if run.check:
            click.echo(f"Users that differ from Clerk: {run.drifted:,}")
        if run.withheld:
            click.echo(
                f"Nothing was deleted: at least {run.withheld:,} users no longer exist at Clerk, "
                "which usually means a wrong CLERK_SECRET_KEY. To delete them: --force",
                err=True,
            )


class Progress(ExitStack):
    """
    Show progress on stderr: a bar on a terminal, elsewhere one line for each part.

    Leaving the context, or ``close()``, ends the current bar.
    """

    _bar: Any

    def begin(self, label: str, total: int | None) -> None:
        """Begin the next part, of *total* users if the number is known."""
        self.close()
        bar = click.progressbar(
            repeat(None), length=total, label=label, file=sys.stderr, show_pos=True
        )
        self._bar = self.enter_context(bar)

    def advance(self, count: int) -> None:
        """Add *count* users to the current part."""
        self._bar.update(count)


@contextmanager
def _reconciliation(output: Output, *, check: bool, force: bool) -> Iterator[Reconciliation]:
    """Yield a reconciliation, and print its summary at the end, even after an error."""
    from clerkhooks.clerk.backend_api import BackendApi  # here, because they are slow to import
    from clerkhooks.sync.connections import reader, sole_writer
    from clerkhooks.sync.reconcile import Reconciliation

    state = current_state()
    settings, store = state.settings, state.store
    if settings.secret_key is None:
        raise CannotDo(f"CLERK_SECRET_KEY is not set.\n{VARIABLES['CLERK_SECRET_KEY']}")
    api = BackendApi(settings.api_url, settings.secret_key)
    connecting = reader(store) if check else sole_writer(store)
    finished = False
    with api, Progress() as progress, connecting as connection:
        run = Reconciliation(api, store, connection, progress, output.tell, check, force)
        try:
            yield run
            finished = True
        finally:
            progress.close()
            output.summarize(run, finished=finished)


@contextmanager
def _failures() -> Iterator[None]:
    """
    Turn the errors that end a sync early into messages.

    Raises:
        CannotDo: The sync did not run to its end.
    """
    from clerkhooks.sync.connections import AlreadyRunning

    try:
        with database_failures():
            yield
    except AlreadyRunning:
        raise CannotDo("Another sync is running on this database. Wait until it ends.") from None
    except BackendApiError as error:
        raise CannotDo(f"{error}\n{_CONTINUE}") from None
    except KeyboardInterrupt:
        raise CannotDo(f"Interrupted. {_CONTINUE}") from None
