"""The only place that turns errors into ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from http import HTTPStatus
from typing import Any, ParamSpec, cast

from flask import Request, Response, current_app, request
from werkzeug.exceptions import HTTPException, default_exceptions
from werkzeug.http import HTTP_STATUS_CODES

from clerkhooks.errors import BadRequest, BodyTooLarge, Forbidden, RequestError, Unauthenticated
from clerkhooks.web.logs import log_failure
from clerkhooks.web.state import annotate

P = ParamSpec("P")
MAX_BODY = 1024 * 1024  # bytes
_REASONS = {413: "body_too_large", 500: "internal_error"}


def json_response(body: Mapping[str, Any]) -> Response:
    """Return *body* as JSON with unsorted keys, bypassing the application's JSON provider."""
    return Response(json.dumps(body), content_type="application/json")


def format_time(moment: datetime) -> str:
    """Return a UTC time in the form that JavaScript's ``toISOString`` has."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def problem(
    status: int, reason: str, headers: Mapping[str, str] | None = None, **members: object
) -> Response:
    """Return a problem response with the stable code *reason* and the other *members*."""
    annotate(reason=reason)
    title = HTTP_STATUS_CODES.get(status, "Unknown Error")
    body = {"type": "about:blank", "title": title, "status": status, "reason": reason}
    text = json.dumps(body | members)
    return Response(text, status, headers, content_type="application/problem+json")


def answered(view: Callable[P, Response]) -> Callable[P, Response]:
    """Turn a view's errors into problem responses, bypassing the application's error handlers."""

    @wraps(view)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return view(*args, **kwargs)
        except RequestError as error:
            return from_request_error(error)
        except HTTPException as error:
            return cast("Response", from_http_exception(error))
        except Exception as error:
            log_failure(error)
            if current_app.debug:  # let the debugger show the error
                raise
            return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error")

    return answer


def read_body(*, unreadable: type[RequestError] = BadRequest) -> bytes:
    """
    Return the current request's body, up to 1 MiB. The application's limit is ignored.

    Raises:
        BodyTooLarge: the body is longer.
        RequestError: the body cannot be read, for instance because chunks are malformed. The
            exception has the class *unreadable* and the reason ``body_unreadable``.
    """
    received = cast("Request", request._get_current_object())  # type: ignore[attr-defined]
    if (received.content_length or 0) > MAX_BODY:
        raise BodyTooLarge("body_too_large")
    # Werkzeug silently truncates a chunked body at the limit. Reading one more byte reveals this.
    received.max_content_length = MAX_BODY + 1
    try:
        body = received.get_data(cache=False)
    except Exception:  # noqa: BLE001  # each server raises different errors for malformed bodies
        raise unreadable("body_unreadable") from None
    if len(body) > MAX_BODY:
        raise BodyTooLarge("body_too_large")
    return body


def from_request_error(error: RequestError) -> Response:
    """Return the problem response for one of clerkhooks' own errors."""
    headers: dict[str, str] = {}
    members: dict[str, object] = {}
    if isinstance(error, Forbidden) and error.reverification is not None:
        # Clerk's front-end libraries read this member and then ask the user to verify again.
        members["clerk_error"] = {
            "type": "forbidden",
            "reason": "reverification-error",
            "metadata": {"reverification": error.reverification},
        }
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return problem(error.status, error.reason, headers, **members)


def from_http_exception(error: HTTPException) -> Any:
    """Return the problem response for an HTTP error; text passed to ``abort`` is its detail."""
    if error.response is not None:
        return error.get_response()
    status = error.code or 500
    kept = ("Allow", "Retry-After", "WWW-Authenticate")
    headers = {key: value for key, value in error.get_headers() if key in kept}
    title = HTTP_STATUS_CODES.get(status, "Unknown Error")
    reason = _REASONS.get(status) or re.sub(r"[^a-z0-9]+", "_", title.lower())
    usual = getattr(default_exceptions.get(status), "description", None)
    own_text = error.description if error.description != usual else None
    members = {"detail": own_text} if own_text else {}
    return problem(status, reason, headers, **members)
