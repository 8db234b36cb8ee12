"""One line a request, to stdout: JSON on a platform, readable on a terminal. What a line may hold is named here."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from flask import Flask, Response, has_request_context, request

from clerkhooks.errors import describe, frames

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

logger = logging.getLogger("clerkhooks")
PATH_LENGTH = 512
_FIELDS, _REQUEST_ID, _STARTED_AT = "clerkhooks.log_fields", "clerkhooks.request_id", "clerkhooks.started_at"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_COLOURS = {"warning": "yellow", "error": "red", "critical": "red"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, event, the fields that were given as ``extra``, and the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        """Leave the text of an exception out: it may quote a row."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": moment, "level": record.levelname.lower(), "event": record.getMessage()} | _extra(record))


class TextFormatter(logging.Formatter):
    """The same, for a person: a request by its line, anything else by its name, then the other fields."""

    def format(self, record: logging.LogRecord) -> str:
        """What cannot be printed is escaped: a path must not move the cursor."""
        fields, level, what = _extra(record), record.levelname.lower(), record.getMessage()
        if what == "request":
            method, path, status, duration = (fields.pop(name) for name in ("method", "path", "status", "duration_ms"))
            what = f"{method} {path} {status} {duration} ms"
        moment = f"{datetime.fromtimestamp(record.created):%H:%M:%S}.{record.msecs:03.0f}"  # noqa: DTZ006  # of the person who reads it
        text = "  ".join([what, *(f"{name}={value}" for name, value in fields.items())])
        text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
        return f"{moment} {self._coloured(level)} {text}"

    def _coloured(self, level: str) -> str:
        shown = f"{level.upper():<7}"
        plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
        return shown if plain else click.style(shown, fg=_COLOURS.get(level))


def init_logs(app: Flask, log_format: str | None) -> None:
    """Log every request of *app* once, when its response is ready; as *log_format* says, ``json`` or ``text``, or as stdout asks for."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        readable = log_format == "text" if log_format else sys.stdout.isatty()
        handler.setFormatter(TextFormatter() if readable else JsonFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    app.url_value_preprocessor(_start)  # runs before all else, also before one of an application's that aborts
    app.after_request(_log_request)


def annotate(**fields: str | float | None) -> None:
    """Add ids, codes and figures to the line of the current request. Never a text that a user chose."""
    request_fields().update(fields)


def log_failure(error: BaseException) -> None:
    """Log an unexpected exception once: its class, its SQLSTATE and the frames it came through, never its text."""
    ids = {name: request_fields().get(name) for name in ("message_id", "user_id")}
    logger.error("request_failed", extra=ids | {"error": describe(error), "frames": frames(error)})


def request_fields() -> dict[str, Any]:
    """What is known of the current request so far."""
    # Kept with the request: an application context may be pushed for longer, as tests do, and g with it.
    fields: dict[str, Any] = request.environ.setdefault(_FIELDS, {})
    return fields


def seconds_so_far() -> float:
    """How long the current request has taken."""
    return float(time.perf_counter() - request.environ[_STARTED_AT])


def _request_id(environ: WSGIEnvironment) -> str:
    """The request's id: its caller's, where that is one, or a new one."""
    request_id: str | None = environ.get(_REQUEST_ID)
    if request_id is None:
        sent = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ[_REQUEST_ID] = sent if _SANE.fullmatch(sent) else secrets.token_hex(16)
    return request_id


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD and value is not None}
    return extra | {"request_id": _request_id(request.environ)} if has_request_context() else extra


def _start(_endpoint: str | None, _values: dict[str, Any] | None) -> None:
    request.environ[_STARTED_AT] = time.perf_counter()


def _log_request(response: Response) -> Response:
    environ, status, fields = request.environ, response.status_code, request_fields()
    response.headers["X-Request-ID"] = _request_id(environ)
    level = logging.ERROR if status >= 500 else logging.WARNING if "reason" in fields else logging.INFO
    if logger.isEnabledFor(level):
        line = {
            "method": environ["REQUEST_METHOD"],
            "path": request.path[:PATH_LENGTH],
            "status": status,
            "duration_ms": round(seconds_so_far() * 1000, 2),
            **fields,
        }
        # Made here and not by log(), which looks through the stack for its caller: this line is known.
        logger.handle(logger.makeRecord(logger.name, level, __file__, 0, "request", (), None, extra=line))
    return response
