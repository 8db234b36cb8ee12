"""``@require_auth``: verifies the session token of a call and knows the user behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from flask import Flask, current_app, g, request
from werkzeug.local import LocalProxy

from clerkhooks import logs, users
from clerkhooks.clerk.session_tokens import Session, TokenRules, verify_session_token
from clerkhooks.errors import KeysUnavailable, Unauthenticated
from clerkhooks.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")


def init_auth(app: Flask, settings: Settings) -> None:
    """Let views of *app* be protected with the keys and rules of *settings*."""
    rules = TokenRules(settings.issuer, frozenset(settings.authorized_parties), frozenset(settings.audience))
    app.extensions["clerkhooks.auth"] = (settings.jwt_keys, rules)


def require_auth(view: Callable[P, R]) -> Callable[P, R]:
    """
    Let only signed-in users call *view*; inside, ``current_user`` and ``current_session`` are theirs.

    Raises:
        Unauthenticated: answered 401, with the reason, for every token that does not hold.
        KeysUnavailable: answered 503, where there is no key to verify with.
    """

    @wraps(view)
    def protected(*args: P.args, **kwargs: P.kwargs) -> R:
        authenticate()
        return view(*args, **kwargs)

    return protected


def authenticate() -> None:
    """Verify the token of the current request and remember session and user for its length."""
    keys, rules = current_app.extensions["clerkhooks.auth"]
    if not keys:
        raise KeysUnavailable("keys_not_configured", retry_after=300)
    session = verify_session_token(find_token(), keys, rules, time.time())
    logs.annotate(user_id=session.user_id)
    g.clerk_user = users.get_authenticated(session.user_id, impersonated=session.impersonated)
    g.clerk_session = session


def find_token() -> str:
    """
    The session token of the current request, unverified.

    Raises:
        Unauthenticated: ``token_missing``, also under another scheme than Bearer.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("token_missing")
    return token


def _current(name: str) -> object:
    if name not in g:
        raise RuntimeError("There is no signed-in user here. Put @require_auth below the route of this view.")
    return g.get(name)


current_user = cast("users.UserSnapshot", LocalProxy(lambda: _current("clerk_user")))
"""The user of this call: a frozen copy of the row. ``db.session.get(User, current_user.id)`` gives the row."""

current_session = cast("Session", LocalProxy(lambda: _current("clerk_session")))
"""The session of this call, as its token says."""
