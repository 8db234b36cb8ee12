"""The commands for an application (``flask clerk …``) and the service (``clerkhooks …``)."""

from __future__ import annotations

import json

import click
from flask.cli import AppGroup, with_appcontext

from clerkhooks.clerk.account import FOREVER
from clerkhooks.cli.changes import changes
from clerkhooks.cli.messages import log, prune
from clerkhooks.cli.options import (
    as_object,
    command,
    database_failures,
    json_option,
    limit_option,
    print_reports,
    print_table,
    printable,
)
from clerkhooks.cli.send import send
from clerkhooks.cli.sync import sync
from clerkhooks.store import queries
from clerkhooks.store.organization_queries import find_memberships
from clerkhooks.web.state import current_state

_TIMES = ("last_seen", "created_at", "updated_at", "deleted_at")
MEMBERSHIPS = ("organization_id", "organization_name", "role", "created_at", "deleted_at", "id")
MAX_MEMBERSHIPS = 100
MESSAGES = ("received_at", "event_type", "outcome", "attempts", "message_id", "error")


@click.command("users")
@click.argument("search", required=False)
@click.option("--deleted", is_flag=True, help="Only deleted users.")
@click.option("--unsynced", is_flag=True, help="Only users without a profile.")
@click.option("--barred", is_flag=True, help="Only banned and deprovisioned users.")
@limit_option
@click.option(
    "--after",
    type=queries.Cursor.parse,
    metavar="CURSOR",
    help="The cursor at the end of the previous page.",
)
@json_option
@with_appcontext
def list_users(
    search: str | None,
    deleted: bool,
    unsynced: bool,
    barred: bool,
    limit: int,
    after: queries.Cursor | None,
    as_json: bool,
) -> None:
    """
    List users, newest first.

    SEARCH is an id, an email address, or the beginning of a first or last name. With --json, the
    output is {"users": [...], "next": cursor or null}.
    """
    if deleted + unsynced + barred > 1:
        raise click.UsageError("Use only one of --deleted, --unsynced and --barred.")
    with database_failures():
        store = current_state().store
        shown = {"deleted": deleted, "unsynced": unsynced, "barred": barred}
        listing = queries.list_users(store, search, **shown)
        found = listing.read_all(limit + 1, after)
    page, has_more = found[:limit], len(found) > limit
    following = str(page[-1].cursor) if has_more else None
    if as_json:
        listed = [as_object(user) | {"source": user.source} for user in page]
        click.echo(json.dumps({"users": listed, "next": following}))
        return
    if not page:
        click.echo("No users found.")
        return
    rows = [(user.id, user.name, user.email, user.created_at, user.source) for user in page]
    print_table(("id", "name", "email", "created_at", "source"), rows)
    if following:
        click.echo(f"\nNext page: --after {following}", err=True)


@click.command("user")
@click.argument("user_id", metavar="ID")
@json_option
@click.pass_context
@with_appcontext
def show_user(context: click.Context, user_id: str, as_json: bool) -> None:
    """
    Show a user's row with its source, version and account state, memberships and messages.

    Your own columns are not shown. The latest messages come first.

    Exit status: 0 if the user has a row, 1 otherwise.
    """
    with database_failures():
        store = current_state().store
        user = queries.list_users(store).find(user_id)
        found = queries.list_messages(store, user_id=user_id).read_all(10)
        memberships = find_memberships(store, MAX_MEMBERSHIPS, user_id=user_id)
    if as_json:
        whole = user and as_object(user) | {"source": user.source}
        messages = [as_object(message) for message in found]
        shown = {"user": whole, "messages": messages}
        if store.memberships is not None:
            shown["memberships"] = [as_object(membership) for membership in memberships]
        click.echo(json.dumps(shown))
    elif user is None:
        click.echo(
            f"{printable(user_id)} has no row. "
            f"To fetch the user from Clerk: {command('sync')} {printable(user_id)}"
        )
    else:
        _print_user(user)
    if not as_json and memberships:
        click.echo()
        print_reports(MEMBERSHIPS, memberships)
    if not as_json and found:
        click.echo()
        print_reports(MESSAGES, found)
    if user is None:
        context.exit(1)


def _print_user(user: queries.UserReport) -> None:
    for name in ("id", "email", "name", "image_url", "is_online", *_TIMES):
        click.echo(f"{name:<12}{printable(getattr(user, name))}")
    as_of = f", as of {printable(user.as_of)} UTC" if user.as_of else ""
    message_id = user.version_message_id
    message = f", message {printable(message_id)}" if message_id else ""
    click.echo(f"{'source':<12}{user.source}{as_of}{message}")
    click.echo(
        f"{'account':<12}{', '.join(_describe(user, state) for state in user.states) or '-'}"
    )


def _describe(user: queries.UserReport, state: str) -> str:
    if state != "locked":
        return f"{state} as of {printable(getattr(user, f'{state}_at'))}"
    is_final = user.locked_until == FOREVER
    return "locked" if is_final else f"locked until {printable(user.locked_until)}"


clerk = AppGroup(
    "clerk",
    help="Users and webhooks from Clerk.",
    commands=[sync, list_users, show_user, log, changes, send, prune],
)
