"""Authentication of a request: finding the token, its session and its user."""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import request

from clerkhooks.clerk.session_tokens import Session
from clerkhooks.errors import Forbidden, Unauthenticated
from clerkhooks.web.state import Authenticator, RequestState

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def sign_in(call: RequestState, *, optional: bool) -> Session | None:
    """
    Authenticate the current request once; store its session and user in its state *call*.

    Raises:
        Unauthenticated, Forbidden, KeysUnavailable: the responses are 401, 403 and 503.
    """
    if not call.is_authenticated or (call.session is None and not optional):
        app = call.app_state
        session = _authenticate(app.authenticator, optional=optional)
        if session is not None:
            call.fields["user_id"] = session.user_id
            call.user, created = app.users.get_authenticated(
                session.user_id, impersonated=session.impersonated
            )
            call.session = session
            if created and app.metrics is not None:
                app.metrics.fallback_users.inc()
        call.is_authenticated = True
    return call.session


def _authenticate(authenticator: Authenticator, *, optional: bool) -> Session | None:
    """
    Return the current request's session, or None if *optional* and the caller is anonymous.

    Raises:
        Unauthenticated: ``token_missing``, or the reason why the first token is invalid.
        Forbidden: ``origin_not_authorized``; another site's page may have sent the cookie.
        KeysUnavailable: no key is available to verify tokens. Unless *optional*, this is raised
            even if the request has no token.
    """
    names = authenticator.cookie_names
    if not optional or request.headers.get("Authorization") or any(map(request.cookies.get, names)):
        authenticator.verifier.keys.require_any()
    refused: Unauthenticated | None = None
    for token, in_cookie in find_tokens(authenticator):
        if in_cookie and not _has_own_origin(authenticator):
            raise Forbidden("origin_not_authorized")
        try:
            return authenticator.verifier.verify(token, time.time(), in_cookie=in_cookie)
        except Unauthenticated as error:
            # Clerk's cookie outlives its token, so an expired token is not a sign of forgery.
            is_anonymous = optional and in_cookie and error.reason == "token_expired"
            refused = refused if is_anonymous else refused or error
    if refused is not None:
        raise refused
    if not optional:
        raise Unauthenticated("token_missing")
    return None


def find_tokens(authenticator: Authenticator) -> Iterator[tuple[str, bool]]:
    """
    Yield each unverified token of the current request, and whether it is from a cookie.

    A bearer token takes precedence over cookies, even if it is invalid. If the Authorization header
    has another scheme, cookies are still read.
    """
    bearer = _find_bearer()
    if bearer is not None:
        yield bearer, False
        return
    for name in authenticator.cookie_names:
        if cookie := request.cookies.get(name):
            yield cookie, True


def _find_bearer() -> str | None:
    """
    Return the bearer token of the current request, or None if the scheme is not Bearer.

    Raises:
        Unauthenticated: ``token_missing``; the scheme is Bearer, but no token follows.
    """
    scheme, _, token = str(request.environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    if scheme.lower() != "bearer":
        return None
    if not token:
        raise Unauthenticated("token_missing")
    return token


def _has_own_origin(authenticator: Authenticator) -> bool:
    """Return whether an authorized page sent the request or the request method is safe."""
    origin = request.headers.get("Origin")
    return request.method in SAFE_METHODS or origin in authenticator.authorized_parties
