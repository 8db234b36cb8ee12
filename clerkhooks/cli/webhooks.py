"""``flask webhooks``: the messages that Clerk sent, and some of one's own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from flask.cli import AppGroup

from clerkhooks import messages, reports
from clerkhooks.cli.options import Age, Since, as_object, database_failures, json_option, print_table, printable
from clerkhooks.cli.send import send
from clerkhooks.models import Outcome

Message = reports.MessageReport
SAFE_AGE = timedelta(days=7)
COLUMNS = ("received_at", "event_type", "outcome", "attempts", "clerk_user_id", "message_id", "error")
POLL = 1.0  # seconds
OVERLAP = timedelta(seconds=15)  # longer than a transaction lasts: what was received earlier may be committed later
webhooks = AppGroup("webhooks", help="The messages that Clerk sent.")
webhooks.add_command(send)


@webhooks.command()
@click.option("--failed", is_flag=True, help="Only those that failed and were never retried to success.")
@click.option("--user", "user_id", metavar="ID", help="Only those about this user.")
@click.option("--type", "event_type", metavar="TYPE", help="Only those of this type, such as user.updated.")
@click.option("--since", type=Since(), help="Only those received since: 10m, 12h, 30d, or 2026-01-31T08:00.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@click.option("--follow", is_flag=True, help="Go on with new ones as they come, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def log(failed: bool, user_id: str | None, event_type: str | None, since: datetime | None, limit: int, follow: bool, as_json: bool) -> None:
    """List the latest messages, the last one at the end. One that failed comes again when a retry is done."""
    wanted: reports.Wanted = {"outcome": "failed" if failed else None, "user_id": user_id, "event_type": event_type}
    with database_failures(), suppress(KeyboardInterrupt):
        began = datetime.now(UTC)
        found = reports.find_messages(since=since, limit=limit, **wanted)[::-1]
        _print(found, as_json, with_names=True)
        if not found and not follow and not as_json:
            click.echo("No such message.")
        if follow:
            for new in _follow(began, found, wanted):
                _print(new, as_json, with_names=False)


def _follow(since: datetime, shown: list[Message], wanted: reports.Wanted) -> Iterator[list[Message]]:
    """What is new at each look: a message that was not there, or one that had failed and was tried again."""
    states = {message.message_id: _state(message) for message in shown}
    while True:
        looked = datetime.now(UTC)
        failed = [message_id for message_id, (outcome, _) in states.items() if outcome == Outcome.FAILED]
        found = reports.find_new_messages(since - OVERLAP, failed, **wanted)
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
    elif found and with_names:
        print_table(COLUMNS, [_row(message) for message in found])
    else:
        for message in found:
            click.echo("  ".join(map(printable, _row(message))))


def _row(message: Message) -> list[Any]:
    return [getattr(message, name) for name in COLUMNS]


@webhooks.command()
@click.option(
    "--older-than",
    type=Age(),
    default="30d",
    show_default=True,
    help="Forget messages that were received and done longer ago: 12h, 30d, 8w.",
)
@click.option("--force", is_flag=True, help="Also forget messages younger than 7 days.")
@json_option
def prune(older_than: timedelta, force: bool, as_json: bool) -> None:
    """
    Forget old messages, in batches that no delivery waits for.

    A message that Svix delivers again after it was forgotten is judged by its version: it finds its user up to date
    and changes nothing. What an application's own receivers did with it would be done again, though, and Svix
    retries and replays for days; so anything younger than 7 days needs --force.
    """
    if older_than < SAFE_AGE and not force:
        raise click.UsageError("Svix may still deliver messages younger than 7 days again. Give --force if you mean it.")
    with database_failures():
        pruned = sum(messages.prune(datetime.now(UTC) - older_than))
    click.echo(json.dumps({"pruned": pruned}) if as_json else f"{pruned} messages forgotten.")
