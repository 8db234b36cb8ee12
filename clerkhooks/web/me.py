"""``GET /api/me`` and ``PUT /api/me/presence``: the signed-in user, for the front end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from flask import Blueprint, Flask, Response, request
from flask_cors.core import FLASK_CORS_EVALUATED, get_cors_options, set_cors_headers

from clerkhooks.clerk import strict_json
from clerkhooks.errors import BadRequest, Forbidden
from clerkhooks.parsing import NATIVE
from clerkhooks.store.models import ClerkUser
from clerkhooks.users import is_present
from clerkhooks.web.auth import current_session, get_user, require_auth
from clerkhooks.web.problems import answered, format_time, json_response, read_body
from clerkhooks.web.state import current_state

ENDPOINTS = ("clerkhooks.get_me", "clerkhooks.put_presence")


def add_routes(blueprint: Blueprint, app: Flask, authorized_parties: Sequence[str]) -> None:
    """Add both routes. In a browser, only pages of the authorized parties may call them."""
    blueprint.add_url_rule("/api/me", view_func=get_me, strict_slashes=False)
    blueprint.add_url_rule(
        "/api/me/presence", view_func=put_presence, methods=["PUT"], strict_slashes=False
    )
    blueprint.after_request(_make_finish(app, authorized_parties))


def _make_finish(app: Flask, authorized_parties: Sequence[str]) -> Callable[[Response], Response]:
    """Return a function that disables caching of responses and adds CORS headers to them."""
    # Use escaped patterns: flask-cors interprets a string with IPv6 brackets as a regular
    # expression.
    origins = [
        re.compile(re.escape(party) + r"\Z") for party in authorized_parties if party != NATIVE
    ]
    options = get_cors_options(
        app,
        {
            "origins": origins,
            "always_send": False,
            "supports_credentials": True,
            "max_age": 600,
            "expose_headers": ["Retry-After", "X-Request-ID"],
        },
    )

    def finish(response: Response) -> Response:
        if request.endpoint in ENDPOINTS:
            response.headers["Cache-Control"] = "no-store"
            if origins:
                if "HTTP_ORIGIN" in request.environ:
                    set_cors_headers(response, options)
                # An application's own CORS(app) runs later and would add the headers again.
                setattr(response, FLASK_CORS_EVALUATED, True)
        return response

    return finish


@answered
@require_auth
def get_me() -> Response:
    """Return the signed-in user."""
    return _shape(get_user())


@answered
@require_auth
def put_presence() -> Response:
    """Set whether the signed-in user is online: ``{"isOnline": bool}``."""
    if current_session.impersonated:
        raise Forbidden("impersonation_not_allowed")
    try:
        body = strict_json.parse(read_body())
    except ValueError:
        raise BadRequest("body_not_json") from None
    is_online = body.get("isOnline") if isinstance(body, dict) else None
    if not isinstance(is_online, bool):
        raise BadRequest("is_online_not_a_boolean")
    return _shape(current_state().users.set_presence(get_user().id, is_online))


def _shape(user: ClerkUser) -> Response:
    return json_response(
        {
            "id": user.id,
            "email": user.email,
            "name": user.name,
            "imageUrl": user.image_url,
            "isOnline": is_present(user),
            "lastSeen": format_time(user.last_seen),
        }
    )
