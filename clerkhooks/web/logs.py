"""
The formats and fields of log lines.

All log lines go to the logger ``clerkhooks``, and the application decides where they are written.
The service prints one line per request to stdout, as text on a terminal and as JSON elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import FunctionType
from typing import Any

import click
from flask import Flask, Response, current_app, has_request_context, request

from clerkhooks.errors import describe, frames
from clerkhooks.web.state import EXTENSION, RequestLog, State, request_state

logger = logging.getLogger("clerkhooks")
PATH_LENGTH = 512
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {"warning": "yellow", "error": "red", "critical": "red"}


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, event, request id and the fields of ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format *record* without the exception's message, which may quote a database row."""
        return self.format_line(
            record.created, record.levelname.lower(), record.getMessage(), _extra(record)
        )

    def format_line(self, created: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        """Format a line that was logged at *created*, in seconds since the epoch."""
        moment = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": moment, "level": level, "event": event, **fields})


class TextFormatter(logging.Formatter):
    """Formats a record as text: the request line or the event's name, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format *record*, escaping control characters that could manipulate the terminal."""
        return self.format_line(
            record.created, record.levelname.lower(), record.getMessage(), _extra(record)
        )

    def format_line(self, created: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        """Format a line that was logged at *created*, in seconds since the epoch."""
        rest = dict(fields)
        if event == "request":
            method, path, status, duration = (
                rest.pop(name) for name in ("method", "path", "status", "duration_ms")
            )
            event = f"{method} {path} {status} {duration} ms"
        local = datetime.fromtimestamp(created)  # noqa: DTZ006  # for a human reader
        moment = local.isoformat(timespec="milliseconds").partition("T")[2]
        text = "  ".join([event, *(f"{name}={value}" for name, value in rest.items())])
        text = "".join(
            character if character.isprintable() else ascii(character)[1:-1] for character in text
        )
        return f"{moment} {self._coloured(level)} {text}"

    def _coloured(self, level: str) -> str:
        shown = f"{level.upper():<7}"
        plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
        return shown if plain else click.style(shown, fg=_COLOURS.get(level))


class ServiceHandler(logging.StreamHandler[Any]):
    """
    Prints the log lines of applications with a request log, in each application's format.

    All applications in a process share the logger, and therefore this handler.
    """

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        formatters: dict[str, JsonFormatter | TextFormatter] = {
            "json": JsonFormatter(),
            "text": TextFormatter(),
        }
        usual = formatters["text" if sys.stdout.isatty() else "json"]
        self._formatters = {"auto": usual, **formatters}

    def emit(self, record: logging.LogRecord) -> None:
        """
        Print *record*, unless the root logger has a handler, which then prints it.

        Records of applications without a request log are not printed.
        """
        state = _find_state()
        is_ours = state is None or state.logs_requests
        if is_ours and not logging.getLogger().handlers:  # basicConfig may add one later
            self.formatter = self._formatters[state.log_format if state else "auto"]
            super().emit(record)

    def print_request(self, log_format: RequestLog, level: int, line: Mapping[str, Any]) -> None:
        """
        Print the line of a request, as ``handle`` does, but without a record.

        A record would take 16 of the 77 µs that the service needs for a request without a database
        query.
        """
        format_line = self._formatters[log_format].format_line
        self.acquire()
        try:
            name = logging.getLevelName(level).lower()
            self.stream.write(format_line(time.time(), name, "request", line) + self.terminator)
            self.flush()
        except Exception:  # noqa: BLE001  # no request fails because of its log line
            self.handleError(logging.makeLogRecord({"msg": "request"}))
        finally:
            self.release()


def init_request_log(app: Flask, log_format: RequestLog) -> None:
    """
    Log each of *app*'s requests when the response is ready, and print the lines to stdout.

    If the root logger already has a handler, that handler prints the lines, as it does for Flask's
    own logger.
    """
    state: State = app.extensions[EXTENSION]
    state.logs_requests, state.log_format = True, log_format
    root = logging.getLogger()
    if not root.handlers and not any(
        isinstance(found, ServiceHandler) for found in logger.handlers
    ):
        logger.addHandler(ServiceHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    app.before_request(_start_clock)
    app.after_request(_log_request)


def log_failure(error: BaseException) -> None:
    """Log an unexpected error with its class, SQLSTATE and frames, but without its message."""
    fields = request_state().fields
    ids = {name: fields.get(name) for name in ("message_id", "user_id")}
    logger.error("request_failed", extra=ids | {"error": describe(error), "frames": frames(error)})


def log_delivery(fields: Mapping[str, Any]) -> None:
    """Log the result of a delivery, unless its failure has been logged already."""
    if fields.get("reason") != "internal_error":
        level = logging.WARNING if "reason" in fields else logging.INFO
        logger.log(level, "webhook_delivered", extra=fields)


def _find_state() -> State | None:
    return current_app.extensions.get(EXTENSION) if current_app else None


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    extra = {
        key: value
        for key, value in vars(record).items()
        if key not in _STANDARD and value is not None
    }
    if record.exc_info and record.exc_info[1] is not None:  # logged by Flask; omit the message
        error = record.exc_info[1]
        extra |= {"error": describe(error), "frames": frames(error)}
    if "request_id" not in extra and has_request_context():
        extra["request_id"] = request_state().request_id
    return extra


def _start_clock() -> None:
    request_state()


def _log_request(response: Response) -> Response:
    state, status = request_state(), response.status_code
    response.headers["X-Request-ID"] = state.request_id
    reason = state.fields.get("reason")
    is_error = status >= 500 and reason != "overloaded"
    level = logging.ERROR if is_error else logging.WARNING if reason else logging.INFO
    if logger.isEnabledFor(level):
        line = {
            "method": request.method,
            "path": request.path[:PATH_LENGTH],
            "status": status,
            "duration_ms": round(state.seconds * 1000, 2),
            **{name: value for name, value in state.fields.items() if value is not None},
            "request_id": state.request_id,
        }
        handler = _find_only_handler()
        if handler is not None:
            handler.print_request(state.app_state.log_format, level, line)
        else:
            # logger.log() would walk the stack to find its caller, which is slow.
            record = logger.makeRecord(
                logger.name, level, __file__, 0, "request", (), None, extra=line
            )
            logger.handle(record)
    return response


def _find_only_handler() -> ServiceHandler | None:
    """Return the handler of the service if nothing else may see, change or drop a record."""
    handlers = [*logger.handlers, *logging.getLogger().handlers]
    handler = handlers[0] if len(handlers) == 1 else None
    if not isinstance(handler, ServiceHandler):
        return None
    is_filtered = logger.filters or handler.filters or handler.level
    return None if is_filtered or _is_instrumented() else handler


def _is_instrumented() -> bool:
    """Return whether a tracing tool replaced a part of ``logging`` that handles records."""
    methods = (getattr(type(logger), name) for name in ("makeRecord", "handle", "callHandlers"))
    return logging.getLogRecordFactory() is not logging.LogRecord or any(
        type(method) is not FunctionType or method.__globals__ is not vars(logging)
        for method in methods
    )
