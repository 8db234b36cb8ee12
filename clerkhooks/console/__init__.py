"""``/console``: what happened to a user, and whether all is well, in a browser. It only reads."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast
from urllib.parse import parse_qs

from flask import Blueprint, Flask, Response, abort, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DataError, SQLAlchemyError

from clerkhooks import activity, logs, reports, users
from clerkhooks.clerk.events import is_user_id
from clerkhooks.console import texts
from clerkhooks.console.access import PATH, Gate, init_access
from clerkhooks.console.chart import draw
from clerkhooks.console.checkup import Checkup
from clerkhooks.diagnosis import Level
from clerkhooks.diagnosis.database import judge_database
from clerkhooks.errors import BadRequest, describe
from clerkhooks.models import Outcome
from clerkhooks.problems import problem
from clerkhooks.settings import Settings

blueprint = Blueprint("console", __name__, url_prefix=PATH, template_folder="templates", static_folder="static")
PAGE = 50
LATEST = 20  # messages of a user that are shown with the row
LONGEST_SEARCH, LONGEST_BODY = 320, 4096  # characters
PERIODS = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7), "30d": timedelta(days=30)}
SHOWN = ("all", "unfilled", "deleted")


def init_console(app: Flask, settings: Settings, password: str) -> None:
    """Register the pages on *app*, behind *password*."""
    app.extensions["clerkhooks.console"] = init_access(app, password, settings.webhook_secrets[0])
    app.extensions["clerkhooks.checkup"] = Checkup()
    app.register_blueprint(blueprint)


def _gate() -> Gate:
    return cast("Gate", current_app.extensions["clerkhooks.console"])


@blueprint.context_processor
def offer_texts() -> dict[str, Any]:
    """How the templates write figures and times."""
    return {"ago": texts.ago, "duration": texts.duration, "moment": texts.moment, "number": texts.number, "now": datetime.now(UTC)}


@blueprint.errorhandler(SQLAlchemyError)
def say_that_the_database_is_away(error: SQLAlchemyError) -> Response:
    """A page that cannot be read now. The overview says it in its own words."""
    logs.annotate(error=describe(error))
    return problem(503, "database_unavailable")


@blueprint.errorhandler(DataError)
def say_that_the_database_cannot_hold_it(_error: DataError) -> Response:
    """What is looked for has characters that the database's encoding has not, so that nothing can be found."""
    return problem(400, "filter_malformed")


@blueprint.get("/")
def overview() -> str:
    """One look that says whether all is well."""
    checkup: Checkup = current_app.extensions["clerkhooks.checkup"]
    now = datetime.now(UTC)
    findings = judge_database()
    figures = None
    if findings[0].level is Level.WRONG:
        logs.annotate(error=findings[0].code)
    else:
        figures = _read_figures(now)
    return render_template(
        "console/overview.html",
        figures=figures,
        report=checkup.read().plus(findings),
        keys=texts.key_set(current_app.extensions["clerkhooks.auth"]),
    )


def _read_figures(now: datetime) -> dict[str, Any] | None:
    """What the overview counts; None where the database cannot say it now."""
    try:
        return _count(now)
    except SQLAlchemyError as error:
        logs.annotate(error=describe(error))
        return None


def _count(now: datetime) -> dict[str, Any]:
    hours = activity.read_activity(now)
    return {
        "activity": hours,
        "chart": draw(hours),
        "lag": activity.find_lag(now),
        "last": activity.find_last_received(),
        "failures": activity.count_failures(),
        "users": activity.count_users(),
        "tombstones": activity.count_tombstones(),
        "unfilled": activity.count_unfilled(timedelta(hours=1)),
        "new": activity.count_new_users(now.replace(hour=0, minute=0, second=0, microsecond=0)),
    }


@blueprint.get("/messages")
def list_messages() -> str:
    """Messages, latest first."""
    asked = {name: _argument(name) for name in ("outcome", "type", "user", "since")}
    if (asked["outcome"] or Outcome.FAILED) not in activity.STORED or (asked["since"] or "1h") not in PERIODS:
        raise BadRequest("filter_malformed")
    page = reports.read_message_page(
        outcome=asked["outcome"],
        event_type=asked["type"],
        user_id=asked["user"],
        since=datetime.now(UTC) - PERIODS[asked["since"]] if asked["since"] else None,
        before=_place(),
        limit=PAGE,
    )
    filters: dict[str, Any] = {name: value for name, value in asked.items() if value}
    older = page.next and url_for(".list_messages", **filters, after=str(page.next))
    return render_template("console/messages.html", page=page, asked=asked, older=older, outcomes=activity.STORED, periods=PERIODS)


@blueprint.get("/messages/<path:message_id>")
def show_message(message_id: str) -> str:
    """A message, and what became of it."""
    message = reports.find_message(_clean(message_id))
    return render_template("console/message.html", message=message, message_id=message_id)


@blueprint.get("/users")
def list_users() -> str:
    """Users, newest first, or those that were searched for."""
    shown, sealed = _argument("show") or "all", _argument("search")
    if shown not in SHOWN:
        raise BadRequest("filter_malformed")
    search = _gate().unseal(sealed) if sealed else None
    found = reports.find_users(search, deleted=shown == "deleted", unsynced=shown == "unfilled", before=_place(), limit=PAGE + 1)
    page = found[:PAGE]
    older = url_for(".list_users", show=shown, search=sealed, after=str(page[-1].place)) if len(found) > PAGE else None
    asked = {"shown": shown, "search": search, "sealed": sealed, "is_lost": sealed is not None and search is None}
    return render_template("console/users.html", users=page, older=older, choices=SHOWN, **asked)


@blueprint.post("/users")
def search_users() -> ResponseReturnValue:
    """Go to what is searched for, whose text is sealed: addresses are logged on the way here."""
    body = request.get_data().decode("utf-8", "replace")[:LONGEST_BODY]
    text = _clean(parse_qs(body).get("search", [""])[0]).strip()[:LONGEST_SEARCH]
    if is_user_id(text):
        return redirect(url_for(".show_user", user_id=text), 303)
    return redirect(url_for(".list_users", search=_gate().seal(text) if text else None), 303)


@blueprint.get("/users/<user_id>")
def show_user(user_id: str) -> str:
    """A user's row, why it looks as it does, and the last messages about it."""
    if not is_user_id(user_id):
        abort(404)
    user = reports.find_user(user_id)
    messages = reports.read_message_page(user_id=user_id, limit=LATEST)
    winner = reports.find_message(user.version_message_id) if user and user.version_message_id else None
    is_present = user is not None and users.is_present(user)
    return render_template("console/user.html", is_present=is_present, user=user, user_id=user_id, messages=messages, winner=winner)


def _argument(name: str) -> str | None:
    return _clean(request.args.get(name, "")).strip() or None


def _place() -> reports.Place | None:
    text = _argument("after")
    try:
        return reports.Place.parse(text) if text else None
    except ValueError:
        raise BadRequest("cursor_malformed") from None


def _clean(text: str) -> str:
    """*text*, if a database can hold it."""
    if "\0" in text:
        raise BadRequest("filter_malformed")
    return text
