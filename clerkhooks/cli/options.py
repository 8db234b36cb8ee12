"""What several commands share."""

from __future__ import annotations

import re
from datetime import timedelta

import click

from clerkhooks.errors import describe

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


class DatabaseFailed(click.ClickException):
    """The database did not do what the command is for: status 2, and never its own text, which may quote a row."""

    exit_code = 2

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"The database failed ({describe(error)}). Is DATABASE_URL right, and is it migrated: flask --app wsgi db upgrade?"
        )


class Age(click.ParamType[timedelta]):
    """An age such as 12h, 30d or 8w."""

    name = "age"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Text to timedelta; anything else ends the command with status 2."""
        found = re.fullmatch(r"([0-9]{1,4})([hdw])", value)
        if found is None:
            self.fail(f"{value!r} is not an age; write 12h, 30d or 8w.", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
