"""The commands of ``flask --app wsgi``."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import click
from flask.cli import AppGroup

from clerkhooks import messages

SAFE_AGE = timedelta(days=7)
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


class Age(click.ParamType[timedelta]):
    """An age such as 12h, 30d or 8w."""

    name = "age"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Text to timedelta; anything else ends the command with status 2."""
        found = re.fullmatch(r"([0-9]{1,4})([hdw])", value)
        if found is None:
            self.fail(f"{value!r} is not an age; write 12h, 30d or 8w.", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


webhooks = AppGroup("webhooks", help="The log of messages that Clerk sent.")


@webhooks.command()
@click.option("--older-than", type=Age(), default="30d", show_default=True, help="Forget messages last touched longer ago: 12h, 30d, 8w.")
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
    pruned = sum(messages.prune(datetime.now(UTC) - older_than))
    click.echo(json.dumps({"pruned": pruned}) if as_json else f"{pruned} messages forgotten.")
