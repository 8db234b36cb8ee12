"""
Options, output and error messages that several commands share.

The ``parse_…`` functions are parameter types for click. They raise BadParameter for malformed
values.
"""

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

from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER
from clerkhooks.errors import describe

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
json_option: Callable[..., Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON."
)
json_lines_option: Callable[..., Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per line."
)
limit_option: Callable[..., Any] = click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=50,
    show_default=True,
    help="The maximum number of rows.",
)


class CannotDo(click.ClickException):
    """The command cannot run, for example because a setting is missing. Exit status 2."""

    exit_code = 2


@contextmanager
def database_failures() -> Iterator[None]:
    """Raise CannotDo for a database error. Omit the error's message, which may quote a row."""
    try:
        yield
    except (DataError, UnicodeEncodeError) as error:
        raise CannotDo(
            f"Some characters cannot be represented in the database's encoding ({describe(error)})."
        ) from None
    except SQLAlchemyError as error:
        raise CannotDo(
            f"Database error ({describe(error)}). Check the database's URL. Has the database "
            f"been migrated? Run: flask {'--app wsgi ' if is_service() else ''}db upgrade"
        ) from None


def is_service() -> bool:
    """Return whether the current application is the service."""
    return current_app.name == "clerkhooks"


def command(name: str) -> str:
    """Return the command line that runs the command *name* in the current application."""
    return f"{'clerkhooks' if is_service() else 'flask clerk'} {name}"


def parse_age(text: str) -> timedelta:
    """Parse an age such as 90s, 10m, 12h, 30d or 8w."""
    found = re.fullmatch(r"([0-9]{1,4})([smhdw])", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not an age such as 10m, 12h, 30d or 8w.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time, or an age such as 10m. The default time zone is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime.now(UTC) - parse_age(text)
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError:
        raise click.BadParameter(f"{text!r} is out of range.") from None


def parse_user_id(text: str) -> str:
    """Validate the id of a Clerk user, and return it."""
    if not USER.is_id(text):
        raise click.BadParameter(f"{text!r} is not a Clerk user id, such as user_2abcDEF….")
    return text


def parse_organization_id(text: str) -> str:
    """Validate the id of a Clerk organization, and return it."""
    if not ORGANIZATION.is_id(text):
        raise click.BadParameter(f"{text!r} is not a Clerk organization id, such as org_2abcDEF….")
    return text


def parse_object_id(text: str) -> str:
    """Validate the id of a user, an organization or a membership, and return it."""
    if not any(kind.is_id(text) for kind in (USER, ORGANIZATION, MEMBERSHIP)):
        raise click.BadParameter(
            f"{text!r} is not a Clerk id of a user, an organization or a membership, such as "
            "user_2abcDEF…, org_2abcDEF… or orgmem_2abcDEF…."
        )
    return text


def printable(value: object) -> str:
    """Format *value* for a terminal. Replace control and formatting characters."""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    text = "-" if value is None or value == "" else str(value)
    return "".join(each if each.isprintable() else _REPLACEMENT for each in text)


def mark(ok: bool) -> str:
    """Return a tick or a cross. If the output's encoding lacks them, return + or x."""
    try:
        "✓✗".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "+" if ok else "x"
    return "✓" if ok else "✗"


def print_table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print *rows* below the heading *names*. Cut each line to the width of the terminal."""
    lines = [tuple(names), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    limit = get_terminal_size().columns if sys.stdout.isatty() else None
    for number, line in enumerate(lines):
        padded = (f"{value:<{width}}" for value, width in zip(line, widths, strict=True))
        text = "  ".join(padded).rstrip()
        if limit is not None and len(text) > limit:
            text = f"{text[: limit - 1]}…"
        click.secho(text, bold=number == 0)


def print_reports(names: Sequence[str], reports: Sequence[object]) -> None:
    """Print the attributes *names* of *reports* as a table."""
    print_table(names, [[getattr(report, name) for name in names] for report in reports])


def as_object(report: Any) -> dict[str, Any]:
    """Convert a dataclass to a JSON object. Times are formatted as ISO 8601."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in asdict(report).items()
    }
