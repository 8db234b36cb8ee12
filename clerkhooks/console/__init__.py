"""``/console``: what happened to a user, and whether everything works, in a browser. Read-only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

from flask import Blueprint, Response, request
from flask.sansio.blueprints import BlueprintSetupState
from sqlalchemy.exc import DataError, SQLAlchemyError
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import BaseConverter, Rule

from clerkhooks.console import pages
from clerkhooks.console.access import check_password, set_headers
from clerkhooks.errors import describe
from clerkhooks.web.problems import answered, problem
from clerkhooks.web.state import annotate

P = ParamSpec("P")
View = Callable[..., Response]
VIEWS: tuple[tuple[str, View, Sequence[str]], ...] = (
    ("", pages.show_overview, ("GET", "HEAD")),
    ("/checks", pages.show_checks, ("GET", "HEAD")),
    ("/messages", pages.list_messages, ("GET", "HEAD")),
    ("/messages/<path:message_id>", pages.show_message, ("GET", "HEAD")),
    ("/users", pages.list_users, ("GET", "HEAD", "POST")),
    ("/users/<user_id>", pages.show_user, ("GET", "HEAD")),
    ("/static/<name>", pages.send_static, ("GET", "HEAD")),
    ("/<anything:path>", pages.refuse_unknown, ()),
)


def make_console() -> Blueprint:
    """Make the blueprint of the console. Without CONSOLE_PASSWORD it admits nobody."""
    blueprint = Blueprint("console", __name__, url_prefix="/console")
    blueprint.before_request(check_password)
    blueprint.after_request(set_headers)
    blueprint.record(_add_rules)
    return blueprint


class _AnyPath(BaseConverter):
    """Matches every path. Flask's converter ``path`` does not match ``/x`` or line breaks."""

    regex, part_isolating = r"[\s\S]+", False


class _AnyRequest(Rule):
    """
    A rule without methods, whose path may use the converter ``anything``.

    Otherwise Flask would answer 404 or 405 before the password is checked.
    """

    def get_converter(
        self, variable_name: str, converter_name: str, args: tuple[Any, ...], kwargs: Any
    ) -> BaseConverter:
        """Find ``anything`` here, so that it is not added to the application's URL map."""
        if converter_name == "anything":
            return _AnyPath(self.map)
        return super().get_converter(variable_name, converter_name, args, kwargs)


def _add_rules(setup: BlueprintSetupState) -> None:
    prefix = f"{setup.name_prefix}.{setup.name}".lstrip(".")
    for path, view, methods in VIEWS:
        endpoint = f"{prefix}.{view.__name__}"
        rule = _AnyRequest(f"{setup.url_prefix}{path}", endpoint=endpoint, strict_slashes=False)
        setup.app.url_map.add(rule)
        setup.app.view_functions[endpoint] = _answer(view, methods)


def _answer(view: Callable[P, Response], methods: Sequence[str]) -> Callable[P, Response]:
    """Refuse all methods but *methods*, and answer errors of *view* as problems."""

    @answered
    @wraps(view)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        if methods and request.method not in methods:
            raise MethodNotAllowed(methods)
        try:
            return view(*args, **kwargs)
        except DataError:  # a filter has characters that the database's encoding lacks
            return problem(400, "filter_malformed")
        except SQLAlchemyError as error:
            annotate(error=describe(error))
            return problem(503, "database_unavailable")

    return answer
