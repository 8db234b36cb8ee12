"""HTTP Basic authentication and strict response headers for the console."""

from __future__ import annotations

import hmac

from flask import Response, request

from clerkhooks.web.problems import problem
from clerkhooks.web.state import current_state

CHALLENGE = {"WWW-Authenticate": 'Basic realm="clerkhooks console", charset="UTF-8"'}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex",
}


def check_password() -> Response | None:
    """
    Return None if the current request has the correct password, otherwise a 401 response.

    The user name is ignored. Attempts are not limited, because CONSOLE_PASSWORD has at least 16
    characters.
    """
    password, sent = current_state().settings.console_password, _read_password()
    if password is None or sent is None:
        return problem(401, "password_required", CHALLENGE)
    if not hmac.compare_digest(sent.encode("utf-8", "replace"), password.encode()):
        return problem(401, "password_wrong", CHALLENGE)
    return None


def set_headers(response: Response) -> Response:
    """Set headers that forbid scripts, framing, MIME sniffing and caching."""
    response.headers.update(HEADERS)
    return response


def _read_password() -> str | None:
    try:
        sent = request.authorization
    except ValueError:  # base64 rejects non-ASCII text, and Werkzeug does not catch the error
        return None
    return (sent.password or "") if sent is not None and sent.type == "basic" else None
