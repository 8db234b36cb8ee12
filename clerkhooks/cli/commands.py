"""The commands of ``flask --app wsgi``."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import click
from flask.cli import AppGroup
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks import messages
from clerkhooks.cli.options import Age, DatabaseFailed

SAFE_AGE = timedelta(days=7)


webhooks = AppGroup("webhooks", help="The log of messages that Clerk sent.")


@webhooks.command()
@click.option(
    "--older-than",
    type=Age(),
    default="30d",
    show_default=True,
    help="Forget messages that were received and done longer ago: 12h, 30d, 8w.",
)
@click.option("--force", is_flag=True, help="Also forget messages younger than 7 days.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(older_than: timedelta, force: bool, as_json: bool) -> None:
    """
    Forget old messages, in batches that no delivery waits for.

    A message that Svix delivers again after it was forgotten is judged by its version: it finds its user up to date
    and changes nothing. What an application's own receivers did with it would be done again, though, and Svix
    retries and replays for days; so anything younger than 7 days needs --force.
    """
    if older_than < SAFE_AGE and not force:
        raise click.UsageError("Svix may still deliver messages younger than 7 days again. Give --force if you mean it.")
    try:
        pruned = sum(messages.prune(datetime.now(UTC) - older_than))
    except SQLAlchemyError as error:
        raise DatabaseFailed(error) from None
    click.echo(json.dumps({"pruned": pruned}) if as_json else f"{pruned} messages forgotten.")
