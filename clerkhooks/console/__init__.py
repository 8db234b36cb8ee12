"""``/console``: what happened to a user, and whether everything works, in a browser. Read-only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, Final, ParamSpec
from urllib.parse import parse_qs

from flask import Blueprint, Response, abort, request, url_for
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy.exc import DataError, SQLAlchemyError
from werkzeug.exceptions import MethodNotAllowed

from clerkhooks.clerk.events import is_user_id
from clerkhooks.console import texts
from clerkhooks.console.access import ConsoleAuth, set_headers
from clerkhooks.console.chart import draw
from clerkhooks.console.checkup import Checkup
from clerkhooks.doctor import APPLICATION, SERVICE, Level, Program
from clerkhooks.doctor.database import judge_database
from clerkhooks.errors import BadRequest, describe
from clerkhooks.events import Outcome
from clerkhooks.store import Store, activity, queries
from clerkhooks.users import is_present
from clerkhooks.web.health import METHODS as COMMON_METHODS
from clerkhooks.web.problems import answered, problem, read_body
from clerkhooks.web.state import State, annotate, current_state

P = ParamSpec("P")
PAGE = 50
LATEST = 20  # messages on a user's page
MAX_SEARCH = 320  # characters
PERIODS = {
    "1h": timedelta(hours=1),
    "24h": timedelta(days=1),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
}
SHOWN = ("all", "unfilled", "deleted")
METHODS = (*COMMON_METHODS, "TRACE")
_HERE = Path(__file__).parent
_CONTENT_TYPES = {".css": "text/css; charset=utf-8", ".svg": "image/svg+xml; charset=utf-8"}


def _make_environment() -> Environment:
    """Make a template environment that an application's templates and filters cannot change."""
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals.update(
        url_for=url_for,
        ago=texts.ago,
        duration=texts.duration,
        moment=texts.moment,
        number=texts.number,
    )
    return environment


_ENVIRONMENT: Final = _make_environment()


def make_console(state: State) -> Blueprint:
    """
    Make the console of the application of *state*, behind its CONSOLE_PASSWORD.

    Raises:
        ValueError: the password is not configured.
    """
    password = state.settings.console_password
    if password is None:
        raise ValueError("The console needs CONSOLE_PASSWORD.")
    auth = ConsoleAuth(password, state.settings.webhook_secrets[0])
    pages = Pages(auth, Checkup())
    blueprint = Blueprint("console", __name__, url_prefix="/console")
    blueprint.before_request(auth.check)
    blueprint.after_request(set_headers)
    views: tuple[tuple[str, Callable[..., Response], Sequence[str]], ...] = (
        ("", pages.overview, ("GET",)),
        ("/messages", pages.list_messages, ("GET",)),
        ("/messages/<path:message_id>", pages.show_message, ("GET",)),
        ("/users", pages.list_users, ("GET", "POST")),
        ("/users/<user_id>", pages.show_user, ("GET",)),
        ("/static/<name>", send_static, ("GET",)),
        ("/<path:path>", refuse_unknown, METHODS),
    )
    for rule, view, methods in views:
        # Every method, since a 404 or 405 of the application's would need no password.
        blueprint.add_url_rule(
            rule,
            view_func=_answer(view, methods),
            methods=METHODS,
            strict_slashes=False,
            provide_automatic_options=False,
        )
    return blueprint


def _answer(view: Callable[P, Response], methods: Sequence[str]) -> Callable[P, Response]:
    """Answer errors of *view* as problems, those of the database with a reason of their own."""

    @answered
    @wraps(view)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        if request.method not in (*methods, "HEAD"):
            raise MethodNotAllowed((*methods, "HEAD"))
        try:
            return view(*args, **kwargs)
        except DataError:  # a filter has characters that the database's encoding lacks
            return problem(400, "filter_malformed")
        except SQLAlchemyError as error:
            annotate(error=describe(error))
            return problem(503, "database_unavailable")

    return answer


class Pages:
    """The pages of one application's console."""

    def __init__(self, auth: ConsoleAuth, checkup: Checkup) -> None:
        self._auth, self._checkup = auth, checkup

    def overview(self) -> Response:
        """Show whether everything works. It is a page also if the database is away."""
        state, program, now = current_state(), _find_program(), datetime.now(UTC)
        findings = judge_database(state.store, program)
        is_ready, figures = findings[0].level is not Level.ERROR, None
        if is_ready:
            figures = _read_figures(state.store, now)
        else:
            annotate(error=findings[0].code)
        report = self._checkup.read(state.values, program).plus(findings)
        keys = texts.key_set(state.authenticator)
        return _render(
            "overview.html", figures=figures, is_ready=is_ready, report=report, keys=keys
        )

    def list_messages(self) -> Response:
        """Show messages, newest first."""
        asked = {name: _read_argument(name) for name in ("outcome", "type", "user", "since")}
        outcome, since = asked["outcome"], asked["since"]
        if (outcome or Outcome.FAILED) not in activity.STORED or (since or "1h") not in PERIODS:
            raise BadRequest("filter_malformed")
        page = queries.read_message_page(
            current_state().store,
            outcome=outcome,
            event_type=asked["type"],
            user_id=asked["user"],
            since=datetime.now(UTC) - PERIODS[since] if since else None,
            before=_read_cursor(),
            limit=PAGE,
        )
        filters: dict[str, Any] = {name: value for name, value in asked.items() if value}
        older = page.next and url_for(".list_messages", **filters, after=str(page.next))
        return _render(
            "messages.html",
            page=page,
            asked=asked,
            older=older,
            after=_read_argument("after"),
            outcomes=activity.STORED,
            periods=PERIODS,
        )

    def show_message(self, message_id: str) -> Response:
        """Show a message and its outcome."""
        message = queries.find_message(current_state().store, _check_text(message_id))
        return _render("message.html", message=message, message_id=message_id)

    def list_users(self) -> Response:
        """Show users, newest first, or the users that were searched for."""
        if request.method == "POST":
            return self._search_users()
        shown, token = _read_argument("show") or "all", _read_argument("search")
        if shown not in SHOWN:
            raise BadRequest("filter_malformed")
        search = self._auth.decrypt(token) if token else None
        found = queries.find_users(
            current_state().store,
            search,
            deleted=shown == "deleted",
            unsynced=shown == "unfilled",
            before=_read_cursor(),
            limit=PAGE + 1,
        )
        users, older = found[:PAGE], None
        if len(found) > PAGE:
            cursor = str(users[-1].cursor)
            older = url_for(".list_users", show=shown, search=token, after=cursor)
        return _render(
            "users.html",
            users=users,
            older=older,
            after=_read_argument("after"),
            choices=SHOWN,
            shown=shown,
            search=search,
            token=token,
            is_lost=token is not None and search is None,
        )

    def _search_users(self) -> Response:
        """Redirect to the users that match, with the search encrypted: platforms log URLs."""
        fields = parse_qs(read_body().decode("utf-8", "replace"))
        text = _check_text(fields.get("search", [""])[0]).strip()[:MAX_SEARCH]
        if is_user_id(text):
            location = url_for(".show_user", user_id=text)
        else:
            location = url_for(".list_users", search=self._auth.encrypt(text) if text else None)
        return Response(status=303, headers={"Location": location})

    def show_user(self, user_id: str) -> Response:
        """Show a user's row, what made it so, and the latest messages about the user."""
        if not is_user_id(user_id):
            abort(404)
        store = current_state().store
        user, winner = queries.find_user(store, user_id), None
        messages = queries.read_message_page(store, user_id=user_id, limit=LATEST)
        if user is not None and user.version_message_id:
            winner = queries.find_message(store, user.version_message_id)
        return _render(
            "user.html",
            user=user,
            user_id=user_id,
            is_present=user is not None and is_present(user),
            messages=messages,
            winner=winner,
        )


def send_static(name: str) -> Response:
    """Send a style sheet or an icon."""
    file = _HERE / "static" / name
    content_type = _CONTENT_TYPES.get(file.suffix)
    if content_type is None or not file.is_file():
        abort(404)
    return Response(file.read_bytes(), content_type=content_type)


def refuse_unknown(path: str) -> Response:
    """Answer 404 for a path below the console, to a caller with the password only."""
    del path
    abort(404)


def _find_program() -> Program:
    return SERVICE if current_state().logs_requests else APPLICATION


def _render(template: str, **context: object) -> Response:
    page = _ENVIRONMENT.get_template(f"clerkhooks/{template}").render(
        context,
        endpoint=(request.endpoint or "").rpartition(".")[2],
        command=_find_program().command,
        now=datetime.now(UTC),
    )
    return Response(page, content_type="text/html; charset=utf-8")


def _read_figures(store: Store, now: datetime) -> dict[str, Any] | None:
    """Return the overview's figures, or None if the database cannot answer now."""
    try:
        return _count(store, now)
    except SQLAlchemyError as error:
        annotate(error=describe(error))
        return None


def _count(store: Store, now: datetime) -> dict[str, Any]:
    hours = activity.read_activity(store, now)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return {
        "activity": hours,
        "chart": draw(hours),
        "lag": activity.find_lag(store, now),
        "last": activity.find_last_received(store),
        "failures": activity.count_failures(store),
        "users": activity.count_users(store),
        "tombstones": activity.count_tombstones(store),
        "unfilled": activity.count_unfilled(store, timedelta(hours=1)),
        "new": activity.count_new_users(store, midnight),
    }


def _read_argument(name: str) -> str | None:
    return _check_text(request.args.get(name, "")).strip() or None


def _read_cursor() -> queries.Cursor | None:
    text = _read_argument("after")
    try:
        return queries.Cursor.parse(text) if text else None
    except ValueError:
        raise BadRequest("cursor_malformed") from None


def _check_text(text: str) -> str:
    """
    Return *text*.

    Raises:
        BadRequest: no database can store it.
    """
    if "\0" in text:
        raise BadRequest("filter_malformed")
    return text
