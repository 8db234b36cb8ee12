"""One line of JSON a request, to stdout. What a line may hold is named here; nothing else gets in."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from flask import Flask, Response, request

from clerkhooks.errors import describe, frames

logger = logging.getLogger("clerkhooks")
PATH_LENGTH = 512
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, event, and the fields that were given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Leave the text of an exception out: it may quote a row."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD and value is not None}
        return json.dumps({"time": moment, "level": record.levelname.lower(), "event": record.getMessage()} | extra)


def init_logs(app: Flask) -> None:
    """Log every request of *app* once, when its response is ready."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JsonFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    app.before_request(_start)
    app.after_request(_log_request)


def annotate(**fields: str | None) -> None:
    """Add ids and codes to the line of the current request. Never a text that a user chose."""
    _fields().update(fields)


def log_failure(error: BaseException) -> None:
    """Log an unexpected exception once: its class, its SQLSTATE and the frames it came through, never its text."""
    logger.error("request_failed", extra={"message_id": _fields().get("message_id"), "error": describe(error), "frames": frames(error)})


def _fields() -> dict[str, Any]:
    # Kept with the request: an application context may be pushed for longer, as tests do, and g with it.
    fields: dict[str, Any] = request.environ.setdefault("clerkhooks.log_fields", {})
    return fields


def _start() -> None:
    request.environ["clerkhooks.started_at"] = time.perf_counter()


def _log_request(response: Response) -> Response:
    fields = _fields()
    duration = (time.perf_counter() - request.environ["clerkhooks.started_at"]) * 1000
    extra = {
        "method": request.method,
        "path": request.path[:PATH_LENGTH],
        "status": response.status_code,
        "duration_ms": round(duration, 2),
    }
    level = logging.ERROR if response.status_code >= 500 else logging.WARNING if fields.get("reason") else logging.INFO
    logger.log(level, "request", extra=extra | fields)
    return response
