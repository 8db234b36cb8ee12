"""``send``: an event as Clerk would send it, so that nobody needs a tunnel to try a change."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from flask import current_app, url_for
from flask.cli import with_appcontext

from clerkhooks.clerk.events import is_user_id
from clerkhooks.clerk.fake import clerk_id, event_body, svix_headers, user_data
from clerkhooks.clerk.signatures import SigningSecret
from clerkhooks.cli.options import Age, CannotDo, json_option, printable
from clerkhooks.settings import parse_url
from clerkhooks.web.state import current_state

PREFIXES = {
    "session": "sess",
    "organization": "org",
    "organizationMembership": "orgmem",
    "organizationInvitation": "orginv",
    "email": "ema",
}


@click.command()
@click.argument("event_type", metavar="EVENT")
@click.option(
    "--user", "user_id", metavar="ID", help="The user that it is about.  [default: a new one]"
)
@click.option(
    "--email", default="ada@example.org", show_default=True, help="Their primary address."
)
@click.option("--first-name", default="Ada", show_default=True)
@click.option("--last-name", default="Lovelace", show_default=True)
@click.option(
    "--set",
    "changes",
    metavar="PATH=VALUE",
    multiple=True,
    help="Replace what is at a path: data.public_metadata.plan=pro.",
)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take a whole event, or its data, from a file.",
)
@click.option(
    "--to", metavar="URL", help="Where to post it.  [default: this service on this machine]"
)
@click.option("--message-id", metavar="ID", help="The svix-id.  [default: a new one]")
@click.option(
    "--repeat",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Deliver the same message so many times.",
)
@click.option("--tamper", is_flag=True, help="Change the body after it was signed: see it refused.")
@click.option(
    "--age",
    type=Age(),
    default="0s",
    help="Sign it as sent so long ago, such as 10m: see it refused.",
)
@json_option
@click.pass_context
@with_appcontext
def send(
    context: click.Context,
    event_type: str,
    user_id: str | None,
    email: str,
    first_name: str,
    last_name: str,
    changes: tuple[str, ...],
    file: Path | None,
    to: str | None,
    message_id: str | None,
    repeat: int,
    tamper: bool,
    age: timedelta,
    as_json: bool,
) -> None:
    """
    Post an event as Clerk would, signed with the configured secret, and show request and answer.

    EVENT is a type such as user.created, user.updated or user.deleted. Status: 0 if each delivery
    was taken, 1 if one was refused, as --tamper and --age mean it to be, 2 if nobody listens.
    """
    if user_id is not None and not is_user_id(user_id):
        raise click.UsageError(f"{user_id!r} is not a Clerk user id, such as user_2abcDEF….")
    state = current_state()
    url = _parse_url(to or _own_url())
    data = make_data(
        event_type,
        user_id or clerk_id("user"),
        email=email or None,
        first_name=first_name,
        last_name=last_name,
    )
    event = json.loads(event_body(event_type, data, _now()))
    event |= _read(file) if file else {}
    for change in changes:
        _set(event, change)
    body = json.dumps(event, separators=(",", ":")).encode()
    headers = svix_headers(
        SigningSecret(state.settings.webhook_secrets[0]),
        body,
        message_id,
        int(time.time() - age.total_seconds()),
    )
    if tamper:
        body = (
            body.replace(b'"object":"event"', b'"object":"EVENT"')
            if b'"object":"event"' in body
            else body + b" "
        )
    answers = [_post(url, headers, body) for _ in range(repeat)]
    if as_json:
        request = {"url": url, "headers": headers, "body": body.decode()}
        click.echo(
            json.dumps(
                {
                    "request": request,
                    "answers": [{"status": status, "body": text} for status, text in answers],
                }
            )
        )
    else:
        _show(url, headers, event, answers)
    context.exit(0 if all(200 <= status < 300 for status, _ in answers) else 1)


def make_data(
    event_type: str, user_id: str, *, email: str | None, first_name: str, last_name: str
) -> dict[str, Any]:
    """The ``data`` of an event of this type: complete for users, and what others have in common for the rest."""
    if event_type == "user.deleted":
        return {"deleted": True, "id": user_id, "object": "user"}
    user = user_data(
        user_id,
        email=email,
        first_name=first_name or None,
        last_name=last_name or None,
        updated_at=_now(),
    )
    family = event_type.partition(".")[0]
    if family == "user":
        return user
    common = {
        "id": clerk_id(PREFIXES.get(family, "obj")),
        "object": family,
        "created_at": _now(),
        "updated_at": _now(),
    }
    if family == "session":
        more: dict[str, Any] = {
            "status": "active",
            "user_id": user_id,
            "client_id": clerk_id("client"),
        }
    elif family == "organization":
        more = {
            "name": "Acme",
            "slug": "acme",
            "created_by": user_id,
            "members_count": 1,
            "public_metadata": {},
        }
    elif family == "organizationMembership":
        person = {
            "user_id": user_id,
            "identifier": email,
            "first_name": first_name,
            "last_name": last_name,
        }
        more = {
            "role": "org:member",
            "organization": {"id": clerk_id("org"), "name": "Acme"},
            "public_user_data": person,
        }
    else:
        more = {}
    return common | more


def _now() -> int:
    return int(time.time() * 1000)


def _own_url() -> str:
    """Return where this application takes webhooks, if it is served on its usual port here."""
    is_service = current_app.name == "clerkhooks"
    port = current_state().values.get("PORT") or (8000 if is_service else 5000)
    with current_app.test_request_context():
        path = url_for("clerkhooks.receive_webhook")
    return f"http://127.0.0.1:{port}{path}"


def _parse_url(text: str) -> str:
    try:
        return parse_url(text)
    except ValueError as error:
        raise click.UsageError(f"--to {error}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, OSError):
        value = None
    if not isinstance(value, dict):
        raise click.UsageError(f"{file} holds no JSON object.")
    return value if "data" in value else {"data": value}


def _set(event: dict[str, Any], change: str) -> None:
    """Replace what is at a path, such as data.public_metadata.plan; a value that is no JSON is text."""
    path, equals, text = change.partition("=")
    *way, last = path.split(".")
    if not equals or not all([*way, last]):
        raise click.UsageError(
            f"--set {change!r} is not of the form path=value, such as data.username=ada."
        )
    for name in way:
        event = event.setdefault(name, {})
        if not isinstance(event, dict):
            raise click.UsageError(f"--set {change!r}: there is no object at {name!r}.")
    try:
        event[last] = json.loads(text)
    except ValueError:
        event[last] = text


def _post(url: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
    import httpx  # only here: it takes its time to load

    try:
        response = httpx.post(url, headers=headers, content=body, timeout=20)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CannotDo(
            f"{url} does not answer ({type(error).__name__}). Is the server running? In the service: gunicorn wsgi:app"
        ) from None
    return response.status_code, response.text


def _show(
    url: str, headers: dict[str, str], event: dict[str, Any], answers: list[tuple[int, str]]
) -> None:
    click.secho(f"POST {url}", bold=True)
    for name, value in headers.items():
        click.echo(f"{name}: {printable(value)}")
    click.echo(f"\n{json.dumps(event, indent=2)}\n")
    for status, text in answers:
        click.secho(f"{status} {printable(text.strip())}", fg="green" if status < 300 else "red")
