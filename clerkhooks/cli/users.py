"""``flask users``: the table of users."""

from __future__ import annotations

import json

import click
from flask.cli import AppGroup

from clerkhooks import reports
from clerkhooks.cli.options import as_object, database_failures, json_option, print_table, printable
from clerkhooks.cli.sync import sync

MESSAGES = ("received_at", "event_type", "outcome", "attempts", "message_id", "error")
users = AppGroup("users", help="The table of users.")
users.add_command(sync)


class PlaceType(click.ParamType[reports.Place]):
    """Where a page ends, as it was printed with it."""

    name = "cursor"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> reports.Place:
        """Text to place."""
        try:
            return reports.Place.parse(value)
        except ValueError:
            self.fail("is not a cursor: take it from the end of a page.", param, ctx)


@users.command("list")
@click.argument("search", required=False)
@click.option("--deleted", is_flag=True, help="Only tombstones.")
@click.option("--unsynced", is_flag=True, help="Only rows that nothing has filled in yet.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@click.option("--after", type=PlaceType(), help="Go on where the page before ended.")
@json_option
def list_users(search: str | None, deleted: bool, unsynced: bool, limit: int, after: reports.Place | None, as_json: bool) -> None:
    """
    List users, newest first: all, or those of an id, an email, or the beginning of a name or last name.

    With --json: {"users": [...], "next": cursor or null}.
    """
    if deleted and unsynced:
        raise click.UsageError("A tombstone is never unsynced: give --deleted or --unsynced.")
    with database_failures():
        found = reports.find_users(search, deleted=deleted, unsynced=unsynced, before=after, limit=limit + 1)
    page, has_more = found[:limit], len(found) > limit
    following = str(page[-1].place) if has_more else None
    if as_json:
        click.echo(json.dumps({"users": [as_object(user) | {"source": user.source} for user in page], "next": following}))
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


@users.command()
@click.argument("user_id", metavar="ID")
@json_option
@click.pass_context
def show(context: click.Context, user_id: str, as_json: bool) -> None:
    """Show a user's row, what made it so, and the last messages about it."""
    with database_failures():
        user = reports.find_user(user_id)
        found = reports.find_messages(user_id=user_id, limit=10)
    if as_json:
        whole = user and as_object(user) | {"source": user.source}
        click.echo(json.dumps({"user": whole, "messages": [as_object(message) for message in found]}))
    elif user is None:
        click.echo(f"No row for {printable(user_id)}. If Clerk has this user: flask --app wsgi users sync {printable(user_id)}")
    else:
        _print_user(user)
    if not as_json and found:
        click.echo()
        print_table(MESSAGES, [[getattr(message, name) for name in MESSAGES] for message in found])
    if user is None:
        context.exit(1)


def _print_user(user: reports.UserReport) -> None:
    for name in ("id", "email", "name", "image_url", "is_online", "last_seen", "created_at", "updated_at", "deleted_at"):
        click.echo(f"{name:<12}{printable(getattr(user, name))}")
    click.echo(f"{'filled by':<12}{user.source}{_version(user)}")


def _version(user: reports.UserReport) -> str:
    if user.as_of is None:
        return ""
    return f", as of {printable(user.as_of)} UTC" + (f", message {printable(user.version_message_id)}" if user.version_message_id else "")
