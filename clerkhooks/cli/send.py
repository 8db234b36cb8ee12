"""The ``send`` command: post a signed event, without a tunnel to Clerk."""

from __future__ import annotations

import json
import time
from contextlib import closing
from datetime import timedelta
from typing import Any, TextIO

import click
import httpx
from flask import current_app, url_for
from flask.cli import with_appcontext

from clerkhooks.clerk.download import Connection, UnusableAnswer
from clerkhooks.clerk.fake import clerk_id, event_body, svix_headers, user_data
from clerkhooks.clerk.signatures import SigningSecret
from clerkhooks.cli.options import (
    CannotDo,
    is_service,
    json_option,
    parse_age,
    parse_organization_id,
    parse_user_id,
    printable,
)
from clerkhooks.errors import ProxyUrlError
from clerkhooks.parsing import parse_url
from clerkhooks.web.state import current_state

STATES = ("banned", "deprovisioned", "locked")
MAX_ANSWER = 1024 * 1024  # bytes


@click.command()
@click.argument("event_type", metavar="EVENT")
@click.option(
    "--user",
    "user_id",
    type=parse_user_id,
    metavar="ID",
    help="The user's id.  [default: a new id]",
)
@click.option(
    "--organization",
    "organization_id",
    type=parse_organization_id,
    metavar="ID",
    help="The organization's id.  [default: a new id]",
)
@click.option("--email", default="ada@example.org", show_default=True)
@click.option("--first-name", default="Ada", show_default=True)
@click.option("--last-name", default="Lovelace", show_default=True)
@click.option("--banned", is_flag=True, help="The user is banned.")
@click.option("--deprovisioned", is_flag=True, help="Directory sync deactivated the user.")
@click.option("--locked", is_flag=True, help="The user is locked out, without an end.")
@click.option(
    "--set",
    "changes",
    metavar="PATH=VALUE",
    multiple=True,
    help="Set a field of the event, such as data.public_metadata.plan=pro.",
)
@click.option(
    "--file", type=click.File(encoding="utf-8"), help="A JSON file with the event or its data."
)
@click.option("--to", metavar="URL", help="The endpoint's URL.  [default: on this machine]")
@click.option("--message-id", metavar="ID", help="The svix-id.  [default: a new id]")
@click.option("--repeat", type=click.IntRange(1, 100), default=1, help="How many times to post it.")
@click.option("--tamper", is_flag=True, help="Change the body after signing it.")
@click.option(
    "--age",
    type=parse_age,
    metavar="AGE",
    default="0s",
    help="Sign with a timestamp this old, such as 10m.",
)
@json_option
@click.pass_context
@with_appcontext
def send(
    context: click.Context,
    /,
    event_type: str,
    to: str | None,
    message_id: str | None,
    repeat: int,
    tamper: bool,
    age: timedelta,
    as_json: bool,
    **content: Any,
) -> None:
    """
    Post an event as Clerk would, signed with the configured secret.

    EVENT is a type such as user.created or organizationMembership.deleted. Its data is complete.
    Events with the same --user and --organization fit together. The request and the response are
    printed. The server refuses an event that was tampered with, or that was signed more than 5
    minutes ago.

    Exit status: 0 if every delivery was accepted, 1 if one was refused, 2 if the server does not
    respond.
    """
    url = _parse_url(to or _own_url())
    event = _make_event(event_type, **content)
    body = json.dumps(event, separators=(",", ":")).encode()
    secret = SigningSecret(current_state().settings.webhook_secrets[0])
    headers = svix_headers(secret, body, message_id, int(time.time() - age.total_seconds()))
    if tamper:
        body += b" "
    answers = [_post(url, headers, body) for _ in range(repeat)]
    if as_json:
        request = {"url": url, "headers": headers, "body": body.decode()}
        click.echo(json.dumps({"request": request, "answers": answers}))
    else:
        _show(url, headers, event, answers)
    context.exit(0 if all(200 <= answer["status"] < 300 for answer in answers) else 1)


def _make_event(
    event_type: str,
    user_id: str | None,
    organization_id: str | None,
    changes: tuple[str, ...],
    file: TextIO | None,
    **fields: Any,
) -> dict[str, Any]:
    from clerkhooks.clerk.fake_events import FakeObjects  # servers never need it

    now, objects = int(time.time() * 1000), FakeObjects()
    subjects = (user_id or clerk_id("user"), organization_id or clerk_id("org"))
    states = {name: True for name in STATES if fields.pop(name)}
    given: Any = {name: value or None for name, value in fields.items()}
    user = user_data(subjects[0], **given, updated_at=now) | states
    objects.remember("user.created", user)
    data = objects.event_data(event_type, *subjects, updated_at=now)
    event: dict[str, Any] = json.loads(event_body(event_type, data, now))
    if file is not None:
        event |= _read(file)
    for change in changes:
        _set(event, change)
    return event


def _own_url() -> str:
    """Return the local URL of this application's webhook endpoint."""
    port = current_state().values.get("PORT") or (8000 if is_service() else 5000)
    with current_app.test_request_context():
        path = url_for("clerkhooks.receive_webhook")
    return f"http://127.0.0.1:{port}{path}"


def _parse_url(text: str) -> str:
    try:
        return parse_url(text)
    except ValueError as error:
        raise click.UsageError(f"--to {error}") from None


def _read(file: TextIO) -> dict[str, Any]:
    try:
        value = json.load(file)
    except (ValueError, OSError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise click.UsageError(f"{file.name} is not a JSON object.")
    return value if "data" in value else {"data": value}


def _set(event: dict[str, Any], change: str) -> None:
    """Set a field by its path. A value that is not valid JSON is used as a string."""
    path, equals, text = change.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise click.UsageError(
            f"--set {change!r}: use the form path=value, such as data.username=ada."
        )
    for name in parents:
        event = event.setdefault(name, {})
        if not isinstance(event, dict):
            raise click.UsageError(f"--set {change!r}: {name!r} is not an object.")
    try:
        event[last] = json.loads(text)
    except (ValueError, RecursionError):
        event[last] = text


def _post(url: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    try:
        with closing(
            Connection(url, headers, timeout=20, max_size=MAX_ANSWER, compressed=True)
        ) as connection:
            answer = connection.post(url, body)
    except ProxyUrlError as error:
        raise CannotDo(str(error)) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TimeoutError, UnusableAnswer) as error:
        raise CannotDo(
            f"{url} does not respond ({type(error).__name__}). Start the server first: "
            f"{'gunicorn wsgi:app' if is_service() else 'flask run'}"
        ) from None
    return {"status": answer.status, "body": answer.body.decode(errors="replace")}


def _show(
    url: str, headers: dict[str, str], event: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    click.secho(f"POST {url}", bold=True)
    for name, value in headers.items():
        click.echo(f"{name}: {printable(value)}")
    click.echo(f"\n{json.dumps(event, indent=2)}\n")
    for answer in answers:
        colour = "green" if answer["status"] < 300 else "red"
        click.secho(f"{answer['status']} {printable(answer['body'].strip())}", fg=colour)
