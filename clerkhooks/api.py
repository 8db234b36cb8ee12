"""``/api/me``: the signed-in user, for the front end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from flask import Blueprint, Flask, Response, request
from flask_cors.core import get_cors_options, set_cors_headers

from clerkhooks import users
from clerkhooks.auth import current_user, get_user, require_auth
from clerkhooks.clerk import strict_json
from clerkhooks.errors import BadRequest
from clerkhooks.settings import Settings

blueprint = Blueprint("api", __name__, url_prefix="/api")


def init_api(app: Flask, settings: Settings) -> None:
    """Register the routes on *app*; all below /api/ is open to the authorized parties' front ends, and to no other."""
    app.register_blueprint(blueprint)
    if settings.authorized_parties:
        app.after_request(_answer_cors(app, settings.authorized_parties))


def _answer_cors(app: Flask, authorized_parties: Sequence[str]) -> Callable[[Response], Response]:
    # Patterns, since flask-cors takes an IPv6 host's brackets for one; always_send would name every origin to anyone.
    origins = [re.compile(re.escape(origin) + r"\Z") for origin in authorized_parties]
    exposed = ["Retry-After", "X-Request-ID"]
    options = get_cors_options(
        app, {"origins": origins, "always_send": False, "supports_credentials": True, "max_age": 600, "expose_headers": exposed}
    )

    def answer_cors(response: Response) -> Response:
        # Here and not in flask-cors' own hook, which takes its time also over what is no browser's request.
        if "HTTP_ORIGIN" in request.environ and request.path.startswith("/api/"):
            set_cors_headers(response, options)
        return response

    return answer_cors


@blueprint.after_request
def forbid_storing(response: Response) -> Response:
    """Keep a user's profile out of every cache."""
    response.headers["Cache-Control"] = "no-store"
    return response


@blueprint.get("/me")
@require_auth
def get_me() -> dict[str, Any]:
    """The signed-in user."""
    return _shape(get_user())


@blueprint.put("/me/presence")
@require_auth
def put_presence() -> dict[str, Any]:
    """Set whether the signed-in user is online: ``{"isOnline": bool}``."""
    try:
        body = strict_json.parse(request.get_data(cache=False))
    except ValueError:
        raise BadRequest("body_not_json") from None
    is_online = body.get("isOnline") if isinstance(body, dict) else None
    if not isinstance(is_online, bool):
        raise BadRequest("is_online_not_a_boolean")
    return _shape(users.set_presence(current_user.id, is_online))


def _shape(user: users.UserSnapshot) -> dict[str, Any]:
    return {
        "id": user.id,
        "email": user.email,
        "name": user.name,
        "imageUrl": user.image_url,
        "isOnline": users.is_present(user),
        "lastSeen": user.last_seen.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
