"""The pages of the console."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from flask import Response, abort, request, url_for
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks.clerk.account import FOREVER
from clerkhooks.clerk.kinds import USER
from clerkhooks.console import texts
from clerkhooks.doctor import (
    APPLICATION,
    OUTSIDE_CHECKS,
    SERVICE,
    Finding,
    Level,
    Program,
    diagnose,
)
from clerkhooks.doctor.database import judge_database
from clerkhooks.errors import BadRequest, describe
from clerkhooks.events import Outcome
from clerkhooks.store import Store, activity, queries
from clerkhooks.store.organization_queries import find_memberships
from clerkhooks.users import is_present
from clerkhooks.web.problems import read_body
from clerkhooks.web.state import State, annotate, current_state

PAGE = 50
LATEST = 20  # the number of messages shown on a user's page
MAX_MEMBERSHIPS = 100  # shown on a user's page
MAX_SEARCH = 320  # characters
DAY = timedelta(hours=24)
PERIODS = {"1h": 1, "24h": 24, "7d": 7 * 24, "30d": 30 * 24}  # hours
SHOWN = ("all", "unfilled", "barred", "deleted")


# This template environment is separate, so an application's templates and filters do not affect it.
_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.globals.update(
    url_for=url_for,
    ago=texts.ago,
    duration=texts.duration,
    moment=texts.moment,
    number=texts.number,
    max_count=activity.MAX_COUNT,
    forever=FOREVER,
)


def show_overview() -> Response:
    """Show whether webhooks and the database work, with figures if the database is usable."""
    state, figures = current_state(), None
    findings = _judge_database(state, _find_program())
    is_ready = findings[0].level is not Level.ERROR
    if is_ready:
        figures = _read_figures(state.store, datetime.now(UTC))
    else:
        annotate(error=findings[0].code)
    keys = texts.key_set(state.authenticator.verifier.keys)
    findings = _sort(findings)
    return render("overview", findings=findings, figures=figures, is_ready=is_ready, keys=keys)


def show_checks() -> Response:
    """Run and show the doctor's checks. Each request to Clerk may take at most 5 s."""
    state, program = current_state(), _find_program()
    findings = [*diagnose(state.values, checks=OUTSIDE_CHECKS, program=program)]
    findings += _judge_database(state, program)
    return render("checks", findings=_sort(findings))


def _judge_database(state: State, program: Program) -> list[Finding]:
    durable = state.handlers.durable
    return judge_database(state.store, state.settings, program, durable=durable)


def list_messages() -> Response:
    """Show messages, newest first."""
    asked = {name: read_argument(name) for name in ("outcome", "type", "user", "since")}
    outcome, since = asked["outcome"], asked["since"]
    if (outcome or Outcome.FAILED) not in activity.STORED or (since or "1h") not in PERIODS:
        raise BadRequest("filter_malformed")
    listing = queries.list_messages(
        current_state().store,
        outcome=outcome,
        event_type=asked["type"],
        user_id=asked["user"],
        since=datetime.now(UTC) - timedelta(hours=PERIODS[since]) if since else None,
    )
    page = listing.read_page(PAGE, parse_cursor(read_argument("after")))
    return render("messages", page=page, asked=asked, outcomes=activity.STORED, periods=PERIODS)


def show_message(message_id: str) -> Response:
    """Show a message and its outcome."""
    message = queries.list_messages(current_state().store).find(message_id)
    return render("message", message=message, message_id=message_id)


def list_users() -> Response:
    """Show users, newest first. For a POST request, search for users."""
    if request.method == "POST":
        return _search_users()
    shown = read_argument("show") or "all"
    if shown not in SHOWN:
        raise BadRequest("filter_malformed")
    listing = queries.list_users(
        current_state().store,
        deleted=shown == "deleted",
        unsynced=shown == "unfilled",
        barred=shown == "barred",
    )
    page = listing.read_page(PAGE, parse_cursor(read_argument("after")))
    return render("users", page=page, search=None, choices=SHOWN, shown=shown)


def _search_users() -> Response:
    """
    Show the users that match the submitted search. Redirect to the user if only one matches.

    The search term may be a name or an email, so it is not part of the URL, which platforms log. A
    form that another site submits is harmless: it changes nothing, and the site cannot read the
    page.
    """
    form = parse_qs(read_body().decode("utf-8", "replace"))
    search, after = (form.get(name, [""])[0].strip() for name in ("search", "after"))
    search = search[:MAX_SEARCH]
    if not search:
        return _redirect(".list_users")
    if USER.is_id(search):
        return _redirect(".show_user", user_id=search)
    store, before = current_state().store, parse_cursor(after)
    page = queries.list_users(store, search).read_page(PAGE, before)
    if len(page.rows) == 1 and not before and not page.next:
        return _redirect(".show_user", user_id=page.rows[0].id)
    return render("users", page=page, search=search, choices=SHOWN, shown=None)


def show_user(user_id: str) -> Response:
    """Show a user's row, its source, and the latest messages about the user."""
    if not USER.is_id(user_id):
        abort(404)
    store = current_state().store
    user, winner = queries.list_users(store).find(user_id), None
    messages = queries.list_messages(store, user_id=user_id).read_page(LATEST)
    if user is not None and user.version_message_id:
        winner = queries.list_messages(store).find(user.version_message_id)
    return render(
        "user",
        user=user,
        user_id=user_id,
        is_present=user is not None and is_present(user),
        messages=messages,
        memberships=find_memberships(store, MAX_MEMBERSHIPS, user_id=user_id),
        winner=winner,
    )


def _find_program() -> Program:
    return SERVICE if current_state().logs_requests else APPLICATION


def _sort(findings: list[Finding]) -> list[Finding]:
    """Sort *findings*, most severe first."""
    return sorted(findings, key=lambda finding: [*Level].index(finding.level))


def render(template: str, **context: object) -> Response:
    """Return the response with a page."""
    page = _ENVIRONMENT.get_template(f"clerkhooks/{template}.html").render(
        context,
        endpoint=(request.endpoint or "").rpartition(".")[2],
        after=read_argument("after"),
        command=_find_program().command,
        has_organizations=current_state().store.memberships is not None,
        now=datetime.now(UTC),
    )
    return Response(page, content_type="text/html; charset=utf-8")


def _redirect(endpoint: str, **values: Any) -> Response:
    return Response(status=303, headers={"Location": url_for(endpoint, **values)})


def _read_figures(store: Store, now: datetime) -> dict[str, Any] | None:
    """Return the overview's figures, or None if a query fails."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        return {
            "outcomes": activity.count_outcomes(store, now - DAY),
            "lag": activity.find_lag(store, now - DAY),
            "last": activity.find_last_received(store),
            "failures": activity.count_failures(store),
            "users": activity.count_users(store),
            "barred": activity.count_barred(store),
            "tombstones": activity.count_tombstones(store),
            "unfilled": activity.count_unfilled(store, timedelta(hours=1)),
            "new": activity.count_new_users(store, midnight),
            "organizations": activity.count_organizations(store),
            "memberships": activity.count_memberships(store),
        }
    except SQLAlchemyError as error:
        annotate(error=describe(error))
        return None


def read_argument(name: str) -> str | None:
    """Return an argument of the query string, or None if it is missing or empty."""
    return request.args.get(name, "").strip() or None


def parse_cursor(text: str | None) -> queries.Cursor | None:
    """
    Parse the cursor of a page.

    Raises:
        BadRequest: ``cursor_malformed``.
    """
    try:
        return queries.Cursor.parse(text) if text else None
    except ValueError:
        raise BadRequest("cursor_malformed") from None
