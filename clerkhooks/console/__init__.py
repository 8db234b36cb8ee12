"""``/console``: read-only pages about users, webhooks and the state of the service."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from flask import Blueprint, Response
from sqlalchemy.exc import DataError, SQLAlchemyError

from clerkhooks.console import organizations, pages
from clerkhooks.console.access import check_password, set_headers
from clerkhooks.errors import describe
from clerkhooks.web.problems import answered, problem
from clerkhooks.web.state import annotate

P = ParamSpec("P")
VIEWS = (
    ("", pages.show_overview, ["GET"]),
    ("/checks", pages.show_checks, ["GET"]),
    ("/messages", pages.list_messages, ["GET"]),
    ("/messages/<path:message_id>", pages.show_message, ["GET"]),
    ("/users", pages.list_users, ["GET", "POST"]),
    ("/users/<user_id>", pages.show_user, ["GET"]),
    ("/organizations", organizations.show_organizations, ["GET"]),
    ("/organizations/<organization_id>", organizations.show_organization, ["GET"]),
)


def make_console() -> Blueprint:
    """Make the blueprint of the console."""
    blueprint = Blueprint("console", __name__, url_prefix="/console", static_folder="static")
    blueprint.before_request(check_password)
    blueprint.after_request(set_headers)
    for path, view, methods in VIEWS:
        blueprint.add_url_rule(
            path, view.__name__, _answer(view), methods=methods, strict_slashes=False
        )
    return blueprint


def _answer(view: Callable[P, Response]) -> Callable[P, Response]:
    """Turn database errors that *view* raises into HTTP error responses."""

    @answered
    @wraps(view)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return view(*args, **kwargs)
        except DataError:  # a filter has a character that the database cannot store, such as NUL
            return problem(400, "filter_malformed")
        except SQLAlchemyError as error:
            annotate(error=describe(error))
            return problem(503, "database_unavailable")

    return answer
