"""Every error as ``application/problem+json`` (RFC 9457), translated here and nowhere else."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any

from flask import Flask, Request, Response
from werkzeug.exceptions import BadRequest as BadRequestBody
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from clerkhooks import logs
from clerkhooks.errors import BadRequest, ClerkhooksError, EventError, Forbidden, KeysUnavailable, SignatureError, Unauthenticated

_STATUS: dict[type[ClerkhooksError], HTTPStatus] = {
    SignatureError: HTTPStatus.UNAUTHORIZED,
    EventError: HTTPStatus.BAD_REQUEST,
    BadRequest: HTTPStatus.BAD_REQUEST,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    KeysUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
_REASONS = {413: "body_too_large", 500: "internal_error"}
LARGEST_BODY = 1024 * 1024  # bytes


class WholeBodyRequest(Request):
    """A request whose body is read whole, or refused."""

    max_content_length: int | None = LARGEST_BODY + 1

    def get_data(self, *args: Any, **kwargs: Any) -> Any:
        """
        The body, as Flask gives it.

        Raises:
            BadRequest: if it cannot be read, as when its chunks are malformed: gunicorn's own errors would be a 500.
            RequestEntityTooLarge: if it is longer than a mebibyte. Werkzeug cuts a chunked one there and says nothing.
        """
        if (self.content_length or 0) > LARGEST_BODY:
            raise RequestEntityTooLarge
        if self.content_length is not None:
            self.max_content_length = None  # the server ends it where it was announced to end
        try:
            body = super().get_data(*args, **kwargs)
        except Exception:  # noqa: BLE001  # whatever a server makes of hostile bytes
            raise BadRequestBody from None
        if len(body) > LARGEST_BODY:
            raise RequestEntityTooLarge
        return body


def init_problems(app: Flask) -> None:
    """Answer every error of *app* as a problem, also those of a body that cannot be read."""
    app.request_class = WholeBodyRequest
    app.register_error_handler(ClerkhooksError, _from_own)
    app.register_error_handler(HTTPException, _from_http)
    app.register_error_handler(Exception, _from_unexpected)


def problem(status: int, reason: str, headers: dict[str, str] | None = None, **members: object) -> Response:
    """A response that says *reason*, a stable code, and no inner detail; *members* are further ones of the body."""
    logs.annotate(reason=reason)
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "reason": reason}
    return Response(json.dumps(body | members), status, headers, content_type="application/problem+json")


def _from_own(error: ClerkhooksError) -> Response:
    status = next((found for kind, found in _STATUS.items() if isinstance(error, kind)), None)
    if status is None:
        return _from_unexpected(error)
    headers, members = {}, {}
    if isinstance(error, Forbidden) and error.reverification is not None:
        # What Clerk's front-end libraries look for before they ask the user to verify again.
        metadata = {"reverification": error.reverification}
        members["clerk_error"] = {"type": "forbidden", "reason": "reverification-error", "metadata": metadata}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, KeysUnavailable):
        headers["Retry-After"] = str(error.retry_after)
    return problem(status, error.reason, headers, **members)


def _from_http(error: HTTPException) -> Response:
    status = error.code or 500
    kept = ("Allow", "Retry-After", "WWW-Authenticate")
    headers = {key: value for key, value in error.get_headers() if key in kept}
    reason = _REASONS.get(status) or re.sub(r"[^a-z0-9]+", "_", HTTPStatus(status).phrase.lower())
    return problem(status, reason, headers)


def _from_unexpected(error: Exception) -> Response:
    logs.log_failure(error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error")
