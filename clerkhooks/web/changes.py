"""``GET /changes``: the change feed, for consumers without access to the database."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from threading import BoundedSemaphore
from typing import Any

from flask import Blueprint, Response, request

from clerkhooks.errors import BadRequest, Unauthenticated
from clerkhooks.store.change_reader import MAX_LIMIT, Change, ChangeReader, Cursor
from clerkhooks.web.health import has_token
from clerkhooks.web.problems import answered, format_time, json_response
from clerkhooks.web.state import current_state

MAX_WAIT = 10  # seconds; gunicorn.conf.py lets a worker end its requests for 12
MAX_WAITING = 20  # requests in a process; others are answered at once
POLL = 1.0  # seconds
DEFAULT_LIMIT = 100
END = "end"
_NAMES = {"object_type": "objectType", "object_id": "objectId", "changed_at": "changedAt"}


def add_route(blueprint: Blueprint) -> None:
    """Add ``/changes``."""
    waiting = BoundedSemaphore(MAX_WAITING)

    @answered
    def get_changes() -> Response:
        """Return the changes after a cursor, waiting for the first one if asked to."""
        state = current_state()
        if not has_token(state.settings.changes_token or ""):
            raise Unauthenticated("changes_token_invalid")
        limit = _number("limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        seconds = _number("wait", 0, 0, MAX_WAIT)
        reader, text = ChangeReader(state.store), request.args.get("after")
        if text == END:
            return _respond([], str(reader.find_end()))
        after = _parse_cursor(text) if text else None
        found = reader.read(after, limit)
        if not found and seconds and waiting.acquire(blocking=False):
            try:
                found = _wait(lambda: reader.read(after, limit), seconds)
            finally:
                waiting.release()
        return _respond(found, found[-1].cursor if found else text)

    blueprint.add_url_rule("/changes", view_func=get_changes, strict_slashes=False)


def _wait(read: Callable[[], list[Change]], seconds: float) -> list[Change]:
    """Return the first changes. Between two reads, no database connection is held."""
    deadline = time.monotonic() + seconds
    while (rest := deadline - time.monotonic()) > 0:
        # Not imported by name: gevent may replace it later, as with preload_app and gunicorn's own
        # gevent worker. The original would block the whole process.
        time.sleep(min(POLL, rest))
        if found := read():
            return found
    return []


def _parse_cursor(text: str) -> Cursor:
    try:
        return Cursor.parse(text)
    except ValueError:
        raise BadRequest("cursor_malformed") from None


def _number(name: str, default: int, least: int, most: int) -> int:
    """
    Return a number from the query string.

    Raises:
        BadRequest: it is malformed, or out of range.
    """
    text = request.args.get(name, "")
    if not text:
        return default
    value = int(text) if re.fullmatch("[0-9]{1,5}", text) else -1
    if not least <= value <= most:
        raise BadRequest("query_invalid")
    return value


def _respond(found: list[Change], following: str | None) -> Response:
    changes = [
        {
            _NAMES.get(one.name, one.name): _shape(getattr(change, one.name))
            for one in fields(change)
        }
        for change in found
    ]
    response = json_response({"changes": changes, "next": following})
    response.headers["Cache-Control"] = "no-store"
    return response


def _shape(value: Any) -> Any:
    return format_time(value) if isinstance(value, datetime) else value
