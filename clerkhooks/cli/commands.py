"""The commands of an application: ``flask clerk …``, and ``clerkhooks …`` in the service."""

from __future__ import annotations

import json

import click
from flask.cli import AppGroup, with_appcontext

from clerkhooks.cli.messages import log, prune
from clerkhooks.cli.options import (
    as_object,
    command,
    database_failures,
    json_option,
    print_table,
    printable,
)
from clerkhooks.cli.send import send
from clerkhooks.cli.sync import sync
from clerkhooks.store import queries
from clerkhooks.web.state import current_state

_TIMES = ("last_seen", "created_at", "updated_at", "deleted_at")
MESSAGES = ("received_at", "event_type", "outcome", "attempts", "message_id", "error")


class CursorType(click.ParamType[queries.Cursor]):
    """Where a page ends, as it was printed with the page."""

    name = "cursor"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> queries.Cursor:
        """Text to cursor."""
        try:
            return queries.Cursor.parse(value)
        except ValueError:
            self.fail("is not a cursor: take it from the end of a page.", param, ctx)


@click.command("users")
@click.argument("search", required=False)
@click.option("--deleted", is_flag=True, help="Only tombstones.")
@click.option("--unsynced", is_flag=True, help="Only rows that nothing has filled in yet.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many."
)
@click.option("--after", type=CursorType(), help="Continue after the previous page.")
@json_option
@with_appcontext
def list_users(
    search: str | None,
    deleted: bool,
    unsynced: bool,
    limit: int,
    after: queries.Cursor | None,
    as_json: bool,
) -> None:
    """
    List users, newest first: all, or those with an id, an email, or the start of a name.

    With --json: {"users": [...], "next": cursor or null}.
    """
    if deleted and unsynced:
        raise click.UsageError("A tombstone is never unsynced: give --deleted or --unsynced.")
    with database_failures():
        store = current_state().store
        found = queries.find_users(
            store, search, deleted=deleted, unsynced=unsynced, before=after, limit=limit + 1
        )
    page, has_more = found[:limit], len(found) > limit
    following = str(page[-1].cursor) if has_more else None
    if as_json:
        listed = [as_object(user) | {"source": user.source} for user in page]
        click.echo(json.dumps({"users": listed, "next": following}))
        return
    if not page:
        click.echo("No such user.")
        return
    print_table(
        ("id", "name", "email", "created_at", "filled by"),
        [(user.id, user.name, user.email, user.created_at, user.source) for user in page],
    )
    if following:
        click.echo(f"\nThere are more: --after {following}", err=True)


@click.command("user")
@click.argument("user_id", metavar="ID")
@json_option
@click.pass_context
@with_appcontext
def show_user(context: click.Context, user_id: str, as_json: bool) -> None:
    """Show a user's row, what made it so, and the last messages about it."""
    with database_failures():
        store = current_state().store
        user = queries.find_user(store, user_id)
        found = queries.find_messages(store, user_id=user_id, limit=10)
    if as_json:
        whole = user and as_object(user) | {"source": user.source}
        messages = [as_object(message) for message in found]
        click.echo(json.dumps({"user": whole, "messages": messages}))
    elif user is None:
        click.echo(
            f"No row for {printable(user_id)}. "
            f"If Clerk has this user: {command('sync')} {printable(user_id)}"
        )
    else:
        _print_user(user)
    if not as_json and found:
        click.echo()
        print_table(MESSAGES, [[getattr(message, name) for name in MESSAGES] for message in found])
    if user is None:
        context.exit(1)


def _print_user(user: queries.UserReport) -> None:
    for name in ("id", "email", "name", "image_url", "is_online", *_TIMES):
        click.echo(f"{name:<12}{printable(getattr(user, name))}")
    click.echo(f"{'filled by':<12}{user.source}{_version(user)}")


def _version(user: queries.UserReport) -> str:
    if user.as_of is None:
        return ""
    message_id = user.version_message_id
    message = f", message {printable(message_id)}" if message_id else ""
    return f", as of {printable(user.as_of)} UTC{message}"


clerk = AppGroup("clerk", help="Users and webhooks from Clerk.")
for each in (sync, list_users, show_user, log, send, prune):
    clerk.add_command(each)
