"""``@require_auth``: verifies the session token of a call and finds the user behind it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast, overload

from flask import Flask, current_app, has_request_context, request
from werkzeug.local import LocalProxy

from clerkhooks.clerk.authorization import Preset, Reverification, check_questions
from clerkhooks.clerk.session_tokens import Session, SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import ConfiguredKeys, FetchedKeys
from clerkhooks.errors import Forbidden, RequestError, Unauthenticated
from clerkhooks.settings import NATIVE, Settings
from clerkhooks.store.models import ClerkUser
from clerkhooks.web.state import Authenticator, annotate, current_state, request_state

P = ParamSpec("P")
R = TypeVar("R")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_PROTECTED_BY = "_clerkhooks_protected_by"


def make_authenticator(settings: Settings) -> Authenticator:
    """Build the authenticator from *settings*."""
    parties = frozenset(settings.authorized_parties)
    rules = TokenRules(
        frozenset(settings.issuers),
        parties - {NATIVE},
        frozenset(settings.audience),
        native=NATIVE in parties,
    )
    verifier = SessionVerifier(find_keys(settings), rules)
    return Authenticator(verifier, rules.authorized_parties, find_cookie_names(settings))


def find_keys(settings: Settings) -> ConfiguredKeys | FetchedKeys:
    """Return the configured keys, else the Frontend API's, else the Backend API's."""
    keep_for = settings.jwks_keep_hours * 3600.0
    if settings.jwt_keys:
        return ConfiguredKeys(settings.jwt_keys)
    if settings.jwks_url:
        return FetchedKeys(settings.jwks_url, keep_for=keep_for)
    if settings.secret_key:
        headers = {"Authorization": f"Bearer {settings.secret_key}"}
        return FetchedKeys(f"{settings.api_url}/v1/jwks", headers, keep_for=keep_for)
    return ConfiguredKeys(())


def find_cookie_names(settings: Settings) -> tuple[str, ...]:
    """
    Return the cookies that may carry a token, the instance's own first.

    Without authorized parties there are no such cookies: one is sent with a forged request, so only
    ``azp`` and ``Origin`` tell whose page sent it.
    """
    if not any(party != NATIVE for party in settings.authorized_parties):
        return ()
    if settings.publishable_key is None:
        return ("__session",)
    digest = hashlib.sha1(settings.publishable_key.encode(), usedforsecurity=False).digest()
    return (f"__session_{base64.urlsafe_b64encode(digest).decode()[:8]}", "__session")


def fetch_keys_soon(app: Flask) -> None:
    """Fetch the keys before the first call needs them, if they are fetched at all."""
    keys = app.extensions["clerkhooks"].authenticator.verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.fetch_soon()


@dataclass(frozen=True)
class Protection:
    """The result of ``require_auth(…)``: a decorator, and a function for ``before_request``."""

    questions: Mapping[str, Any]
    optional: bool = False

    @overload
    def __call__(self, view: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def __call__(self) -> None: ...
    def __call__(self, *views: Any) -> Any:
        """Protect a view; without one, let the current request pass or refuse it."""
        if not views:
            return self._let_pass()
        (view,) = views
        if not callable(view) or isinstance(view, type):
            raise TypeError(
                "require_auth protects a view function. "
                "For a MethodView put it into its decorators, or on its methods."
            )

        is_async = iscoroutinefunction(view)

        @wraps(view)
        def protected(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return (current_app.ensure_sync(view) if is_async else view)(*args, **kwargs)

        _remember_protection(view, protected)
        return protected

    def check(self) -> None:
        """
        Authenticate the caller and check the questions.

        Raises:
            Unauthenticated, Forbidden, KeysUnavailable: answered 401, 403 and 503.
        """
        metrics = current_state().metrics
        try:
            self._ask(_sign_in(optional=self.optional))
        except RequestError as error:
            if metrics is not None:
                metrics.sessions_refused.labels(error.reason).inc()
            raise
        if metrics is not None and request_state().session is not None:
            metrics.sessions_verified.inc()

    def _ask(self, session: Session | None) -> None:
        if session is not None and self.questions and not session.has(**self.questions):
            others = {
                name: value for name, value in self.questions.items() if name != "reverification"
            }
            if "reverification" in self.questions and (not others or session.has(**others)):
                raise Forbidden("reverification_required", self.questions["reverification"])
            raise Forbidden("forbidden")

    def _let_pass(self) -> Any:
        # A browser asks with OPTIONS, and without a token, whether it may send one; Flask answers
        # that by itself.
        if request.method == "OPTIONS" and getattr(
            request.url_rule, "provide_automatic_options", False
        ):
            return None
        return self.check()


@overload
def require_auth(view: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def require_auth(
    *,
    role: str | None = None,
    permission: str | None = None,
    feature: str | None = None,
    plan: str | None = None,
    reverification: Preset | Reverification | None = None,
    optional: bool = False,
) -> Protection: ...
def require_auth(
    view: Callable[..., Any] | None = None,
    /,
    *,
    role: str | None = None,
    permission: str | None = None,
    feature: str | None = None,
    plan: str | None = None,
    reverification: Preset | Reverification | None = None,
    optional: bool = False,
) -> Callable[..., Any] | Protection | None:
    """
    Let only signed-in users call a view, as ``current_user`` and ``current_session``.

    ``@require_auth`` alone, or with what ``current_session.has`` shall say yes to:
    ``@require_auth(role="org:admin")``. It stands below the route, in a MethodView's
    ``decorators``, on its methods, or guards a whole blueprint:
    ``blueprint.before_request(require_auth())``. With ``optional=True`` an anonymous caller is let
    in, also one whose cookie has expired; use ``hooks.optional_user`` and
    ``hooks.optional_session`` there, which may be None. Any other invalid token is still refused.

    Raises:
        Unauthenticated: answered 401, with the reason, for every token that does not hold.
        Forbidden: answered 403, where the session is not enough. KeysUnavailable: answered 503,
        where there is no key to verify with. TypeError, ValueError: where the view is defined, for
        a question that no session could ever meet.
    """
    asked = {
        "role": role,
        "permission": permission,
        "feature": feature,
        "plan": plan,
        "reverification": reverification,
    }
    questions = {name: value for name, value in asked.items() if value is not None}
    questions = check_questions(questions)
    if optional and questions:
        raise ValueError(
            "optional=True cannot be combined with questions. "
            "Ask hooks.optional_session.has() inside the view instead."
        )
    protection = Protection(questions, optional)
    return protection if view is None else protection(view)


def find_unprotected(app: Flask) -> str | None:
    """
    Return an endpoint whose view was protected only after it was registered, or None.

    A view that another endpoint serves with its protection is judged alike: of two stacked routes
    with ``require_auth`` between them, one is public.
    """
    for endpoint, view in app.view_functions.items():
        protections = getattr(view, "__dict__", {}).get(_PROTECTED_BY, ())
        is_bare = protections and set(_unwrap(view)).isdisjoint(protections)
        if is_bare and not _is_guarded(app, endpoint):
            return endpoint
    return None


def _is_guarded(app: Flask, endpoint: str) -> bool:
    """Return whether the application, or a blueprint around *endpoint*, asks for a session."""
    parts = endpoint.split(".")[:-1]
    names = [None, *(".".join(parts[: end + 1]) for end in range(len(parts)))]
    functions = [one for name in names for one in app.before_request_funcs.get(name, ())]
    return any(isinstance(one, Protection) and not one.optional for one in functions)


def _remember_protection(view: Callable[..., Any], protected: Callable[..., Any]) -> None:
    """Mark *view*, and what it wraps, so that registering it without its protection is noticed."""
    vars(protected).pop(_PROTECTED_BY, None)  # wraps() has copied it from a view protected twice
    for inner in _unwrap(view):
        if hasattr(inner, "__dict__"):
            # A factory that is called twice protects a view of its module's twice.
            inner.__dict__[_PROTECTED_BY] = (*vars(inner).get(_PROTECTED_BY, ()), protected)


def _unwrap(view: Any) -> Iterator[Any]:
    """Yield *view*, and each function that it was made of by a decorator."""
    while view is not None:
        yield view
        view = getattr(view, "__wrapped__", None)


def find_tokens(authenticator: Authenticator) -> Iterator[tuple[str, bool]]:
    """
    Yield the session tokens of the current request, unverified, and whether each came in a cookie.

    A bearer token wins over every cookie, even if it is bad. Another scheme does not hide the
    cookies.
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
    Return the bearer token of the current request, or None if its authorization has another scheme.

    Raises:
        Unauthenticated: ``token_missing``; the scheme is Bearer, and no token follows.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    if not token:
        raise Unauthenticated("token_missing")
    return token


def _sign_in(*, optional: bool) -> Session | None:
    """Authenticate the current request, once, and remember session and user with it."""
    state = request_state()
    if not state.is_authenticated or (state.session is None and not optional):
        session = _authenticate(optional=optional)
        if session is not None:
            annotate(user_id=session.user_id)
            app = current_state()
            impersonated = session.impersonated
            user, created = app.users.get_authenticated(session.user_id, impersonated=impersonated)
            state.session, state.user = session, user
            if created and app.metrics is not None:
                app.metrics.fallback_users.inc()
        state.is_authenticated = True
    return state.session


def _authenticate(*, optional: bool) -> Session | None:
    """
    Return the session that the current request proves; in an optional view None for no session.

    Raises:
        Unauthenticated: ``token_missing``, or why the first token does not hold.
        Forbidden: ``origin_not_authorized``, for a cookie that another site's page may have sent.
        KeysUnavailable: there is no key to verify with, whatever was sent.
    """
    authenticator = current_state().authenticator
    if not optional or request.headers.get("Authorization") or _has_cookie(authenticator):
        authenticator.verifier.keys.require_any()
    refused: Unauthenticated | None = None
    for token, in_cookie in find_tokens(authenticator):
        if in_cookie and not _has_own_origin(authenticator):
            raise Forbidden("origin_not_authorized")
        try:
            return authenticator.verifier.verify(token, time.time(), in_cookie=in_cookie)
        except Unauthenticated as error:
            # Clerk's cookie outlives the token in it, so an expired one is not a sign of forgery.
            is_anonymous = optional and in_cookie and error.reason == "token_expired"
            refused = refused if is_anonymous else refused or error
    if refused is not None:
        raise refused
    if not optional:
        raise Unauthenticated("token_missing")
    return None


def _has_own_origin(authenticator: Authenticator) -> bool:
    """Return whether a page of ours sent the request; reading needs no such proof."""
    origin = request.headers.get("Origin")
    return request.method in SAFE_METHODS or origin in authenticator.authorized_parties


def _has_cookie(authenticator: Authenticator) -> bool:
    return any(request.cookies.get(name) for name in authenticator.cookie_names)


def _state() -> Any:
    if not has_request_context() or not request_state().is_authenticated:
        raise RuntimeError(
            "There is no signed-in user here. Put @require_auth below the route of this view."
        )
    return request_state()


def get_user() -> ClerkUser:
    """Return the current user without the proxy."""
    return cast("ClerkUser", _state().user)


def get_session() -> Session:
    """Return the current session without the proxy."""
    return cast("Session", _state().session)


current_user = cast("ClerkUser", LocalProxy(get_user))
"""The user of this call: a frozen copy of the row. ``hooks.current_user`` has your model's type."""

current_session = cast("Session", LocalProxy(get_session))
"""The session of this call, as its token says."""
