"""What several commands share: their options, their tables, their failures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from shutil import get_terminal_size
from typing import Any

import click
from flask import current_app
from sqlalchemy.exc import DataError, SQLAlchemyError

from clerkhooks.errors import describe

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
json_option: Callable[..., Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON."
)


class CannotDo(click.ClickException):
    """Wrong settings, or somebody whom the command needs does not answer: status 2."""

    exit_code = 2


class DatabaseFailed(CannotDo):
    """The database did not do what the command is for. Never its own text, which may quote a row."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"The database failed ({describe(error)}). Is its URL right, and has it been migrated? "
            "In the service: flask --app wsgi db upgrade"
        )


@contextmanager
def database_failures() -> Iterator[None]:
    """Whatever the database answers with, in words."""
    try:
        yield
    except (DataError, UnicodeEncodeError) as error:
        raise CannotDo(
            f"Some characters cannot be represented in the database's encoding ({describe(error)})."
        ) from None
    except SQLAlchemyError as error:
        raise DatabaseFailed(error) from None


def command(name: str) -> str:
    """Return how the user of the current application types one of our commands."""
    return f"clerkhooks {name}" if current_app.name == "clerkhooks" else f"flask clerk {name}"


class Age(click.ParamType[timedelta]):
    """An age such as 90s, 10m, 12h, 30d or 8w."""

    name = "age"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """Text to timedelta; anything else ends the command with status 2."""
        found = re.fullmatch(r"([0-9]{1,4})([smhdw])", value)
        if found is None:
            self.fail(f"{value!r} is not an age; write 90s, 10m, 12h, 30d or 8w.", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


class Since(Age):
    """A point in time: an age, or one in ISO 8601, of UTC where it names no zone."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to an aware datetime."""
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return datetime.now(UTC) - super().convert(value, param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def printable(value: object) -> str:
    """*value* for a terminal: what a user chose as a name must not move the cursor or turn the line around."""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    text = "-" if value is None or value == "" else str(value)
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def print_table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns below their *names*; on a terminal no line is longer than it is wide."""
    lines = [tuple(names), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    limit = get_terminal_size().columns if sys.stdout.isatty() else None
    for number, line in enumerate(lines):
        text = "  ".join(
            f"{value:<{width}}" for value, width in zip(line, widths, strict=True)
        ).rstrip()
        click.secho(
            text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…",
            bold=number == 0,
        )


def as_object(report: Any) -> dict[str, Any]:
    """A report as JSON knows it: times in ISO 8601, UTC."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in asdict(report).items()
    }
