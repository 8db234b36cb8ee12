"""The commands ``log`` and ``prune``, which list and delete received messages."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import click
from flask.cli import with_appcontext

from clerkhooks.cli.options import (
    as_object,
    database_failures,
    json_lines_option,
    json_option,
    limit_option,
    parse_age,
    parse_time,
    print_reports,
    printable,
)
from clerkhooks.events import Outcome
from clerkhooks.store import messages, queries
from clerkhooks.store.change_reader import ChangeReader
from clerkhooks.web.state import current_state

Message = queries.MessageReport
SAFE_AGE = timedelta(days=7)
COLUMNS = (
    "received_at",
    "event_type",
    "outcome",
    "attempts",
    "clerk_user_id",
    "message_id",
    "error",
)
POLL = 1.0  # seconds
# Messages may be committed out of order, so polls overlap by more than the longest transaction.
OVERLAP = timedelta(seconds=15)


@click.command()
@click.option("--failed", is_flag=True, help="Only messages that failed.")
@click.option("--user", "user_id", metavar="ID", help="Only messages about this user.")
@click.option("--type", "event_type", metavar="TYPE", help="Only this type, such as user.updated.")
@click.option(
    "--since",
    type=parse_time,
    metavar="TIME",
    help="Only messages since this time, such as 2026-01-31T08:00, or up to this old: 10m, 30d.",
)
@limit_option
@click.option("--follow", is_flag=True, help="Keep printing new messages until Ctrl-C.")
@json_lines_option
@with_appcontext
def log(
    failed: bool,
    user_id: str | None,
    event_type: str | None,
    since: datetime | None,
    limit: int,
    follow: bool,
    as_json: bool,
) -> None:
    """
    List the latest messages, newest last.

    A message counts as failed until a retry succeeds. With --follow, a message is printed again
    after each retry.
    """
    listing = queries.list_messages(
        current_state().store,
        since=since,
        outcome=Outcome.FAILED if failed else None,
        user_id=user_id,
        event_type=event_type,
    )
    with database_failures(), suppress(KeyboardInterrupt):
        began = datetime.now(UTC)
        found = listing.read_all(limit)[::-1]
        _print(found, as_json, with_names=True)
        if not found and not follow and not as_json:
            click.echo("No messages found.")
        if follow:
            for new in _follow(listing, began, found):
                _print(new, as_json, with_names=False)


def _follow(
    listing: queries.Listing[Message], since: datetime, shown: list[Message]
) -> Iterator[list[Message]]:
    """Yield new and retried messages, about once a second."""
    states = {message.message_id: _state(message) for message in shown}
    while True:
        looked = datetime.now(UTC)
        failed = [name for name, (outcome, _) in states.items() if outcome == Outcome.FAILED]
        found = listing.read_new(since - OVERLAP, failed)
        yield [message for message in found if states.get(message.message_id) != _state(message)]
        states = {message.message_id: _state(message) for message in found}
        since = looked
        time.sleep(POLL)


def _state(message: Message) -> tuple[str, int]:
    return message.outcome, message.attempts


def _print(found: list[Message], as_json: bool, *, with_names: bool) -> None:
    if as_json:
        for message in found:
            click.echo(json.dumps(as_object(message)))
        return
    if found and with_names:
        print_reports(COLUMNS, found)
    else:
        for message in found:
            click.echo("  ".join(printable(getattr(message, name)) for name in COLUMNS))


@click.command()
@click.option(
    "--older-than",
    type=parse_age,
    metavar="AGE",
    default="30d",
    show_default=True,
    help="Delete messages and changes older than this, such as 12h, 30d or 8w.",
)
@click.option("--force", is_flag=True, help="Also delete messages and changes younger than 7 days.")
@json_option
@with_appcontext
def prune(older_than: timedelta, force: bool, as_json: bool) -> None:
    """
    Delete old messages and changes, in small batches that do not block deliveries.

    Svix retries a message for more than a day. If a message is redelivered after you have deleted
    it, users stay correct, because their rows are newer. However, an application's handlers run
    again. Messages younger than 7 days are therefore deleted only with --force.

    A reader of the change feed whose cursor is older than the deleted changes gets an error.
    """
    if older_than < SAFE_AGE and not force:
        raise click.UsageError(
            "Svix may still redeliver messages younger than 7 days. To delete them anyway: --force"
        )
    with database_failures():
        store, before = current_state().store, datetime.now(UTC) - older_than
        counts = {"pruned": sum(messages.prune(store, before))}
        if store.changes is not None:
            counts["pruned_changes"] = sum(ChangeReader(store).prune(before))
    if as_json:
        click.echo(json.dumps(counts))
    else:
        names = ("messages", "changes")
        for name, number in zip(names, counts.values(), strict=False):
            click.echo(f"{number} {name} deleted.")
