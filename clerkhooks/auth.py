"""``@require_auth``: verifies the session token of a call and knows the user behind it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast, overload

from flask import Flask, current_app, has_request_context, request
from werkzeug.local import LocalProxy

from clerkhooks import logs, users
from clerkhooks.clerk.authorization import Preset, Reverification, check_questions
from clerkhooks.clerk.session_tokens import Session, SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import ConfiguredKeys, FetchedKeys
from clerkhooks.errors import ClerkhooksError, Forbidden, Unauthenticated
from clerkhooks.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
SignedIn = tuple[Session, users.UserSnapshot] | tuple[None, None]
SIGNED_IN = "clerkhooks.signed_in"
REFUSED = "clerkhooks.refused"


@dataclass(frozen=True)
class Authenticator:
    """What an application verifies calls with. There are no cookie names where cookies do not authenticate."""

    verifier: SessionVerifier
    authorized_parties: frozenset[str]
    cookie_names: tuple[str, ...]


def init_auth(app: Flask, settings: Settings) -> None:
    """Let views of *app* be protected with the keys and rules of *settings*."""
    parties = frozenset(settings.authorized_parties)
    rules = TokenRules(settings.issuer, parties, frozenset(settings.audience))
    app.extensions["clerkhooks.auth"] = Authenticator(SessionVerifier(find_keys(settings), rules), parties, find_cookie_names(settings))


def find_keys(settings: Settings) -> ConfiguredKeys | FetchedKeys:
    """The keys that *settings* name: configured ones before the Frontend API's before the Backend API's."""
    keep_for = settings.jwks_keep_hours * 3600.0
    if settings.jwt_keys:
        return ConfiguredKeys(settings.jwt_keys)
    if settings.jwks_url:
        return FetchedKeys(settings.jwks_url, keep_for=keep_for)
    if settings.secret_key:
        return FetchedKeys(f"{settings.api_url}/v1/jwks", {"Authorization": f"Bearer {settings.secret_key}"}, keep_for=keep_for)
    return ConfiguredKeys(())


def find_cookie_names(settings: Settings) -> tuple[str, ...]:
    """
    The cookies that may carry a token, the instance's own first; none without authorized parties.

    A cookie rides along on a forged request, so only ``azp`` and ``Origin`` tell whose page sent it.
    """
    if not settings.authorized_parties:
        return ()
    if settings.publishable_key is None:
        return ("__session",)
    digest = hashlib.sha1(settings.publishable_key.encode(), usedforsecurity=False).digest()
    return (f"__session_{base64.urlsafe_b64encode(digest).decode()[:8]}", "__session")


def fetch_keys_soon(app: Flask) -> None:
    """Fetch the keys before the first call needs them, where they are fetched at all."""
    keys = app.extensions["clerkhooks.auth"].verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.fetch_soon()


@dataclass(frozen=True)
class Protection:
    """What ``require_auth(…)`` gives: a decorator for a view, and itself a function for ``before_request``."""

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
            raise TypeError("require_auth protects a view function. For a MethodView put it into its decorators, or on its methods.")

        is_async = iscoroutinefunction(view)

        @wraps(view)
        def protected(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return (current_app.ensure_sync(view) if is_async else view)(*args, **kwargs)

        return protected

    def check(self) -> None:
        """
        Sign the caller in, and ask what is to be asked.

        Raises:
            Unauthenticated, Forbidden, KeysUnavailable: answered 401, 403 and 503.
        """
        try:
            self._ask(_sign_in(optional=self.optional))
        except ClerkhooksError as error:
            request.environ[REFUSED] = error.reason
            raise

    def _ask(self, session: Session | None) -> None:
        if session is not None and self.questions and not session.has(**self.questions):
            others = {name: value for name, value in self.questions.items() if name != "reverification"}
            if "reverification" in self.questions and (not others or session.has(**others)):
                raise Forbidden("reverification_required", self.questions["reverification"])
            raise Forbidden("forbidden")

    def _let_pass(self) -> Any:
        # A browser asks with OPTIONS, and without a token, whether it may send one; Flask answers that by itself.
        if request.method == "OPTIONS" and getattr(request.url_rule, "provide_automatic_options", False):
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
    Let only signed-in users call a view; inside, ``current_user`` and ``current_session`` are theirs.

    ``@require_auth`` alone, or with what ``current_session.has`` shall say yes to: ``@require_auth(role="org:admin")``.
    It stands below the route, in a MethodView's ``decorators``, on its methods, or guards a whole blueprint:
    ``blueprint.before_request(require_auth())``. With ``optional=True`` an anonymous caller is let in, and both
    are None; a bad token never is.

    Raises:
        Unauthenticated: answered 401, with the reason, for every token that does not hold.
        Forbidden: answered 403, where the session is not enough.
        KeysUnavailable: answered 503, where there is no key to verify with.
        TypeError, ValueError: where the view is defined, for a question that no session could ever meet.
    """
    asked = {"role": role, "permission": permission, "feature": feature, "plan": plan, "reverification": reverification}
    questions = {name: value for name, value in asked.items() if value is not None}
    questions = check_questions(questions)
    if optional and questions:
        raise ValueError("An anonymous caller can meet no question. Ask current_session.has() inside the view instead.")
    protection = Protection(questions, optional)
    return protection if view is None else protection(view)


def find_token(authenticator: Authenticator) -> str:
    """
    The session token of the current request, unverified. A header wins over any cookie, also when it is bad.

    Raises:
        Unauthenticated: ``token_missing``.
        Forbidden: ``origin_not_authorized``, for a cookie on a request that a page of somebody else may have forged.
    """
    header = request.environ.get("HTTP_AUTHORIZATION")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() == "bearer" and token:
            return str(token)
        raise Unauthenticated("token_missing")
    cookie = _find_cookie(authenticator)
    if cookie is None:
        raise Unauthenticated("token_missing")
    if request.method not in SAFE_METHODS and request.headers.get("Origin") not in authenticator.authorized_parties:
        raise Forbidden("origin_not_authorized")
    return cookie


def _find_cookie(authenticator: Authenticator) -> str | None:
    return next(filter(None, map(request.cookies.get, authenticator.cookie_names)), None)


def _sign_in(*, optional: bool) -> Session | None:
    """Verify the token of the current request, once, and remember session and user with the request."""
    # Not in g: an application context may be pushed for longer, as tests do, and would sign the next caller in.
    environ = request.environ
    signed_in: SignedIn = environ.get(SIGNED_IN, (None, None))
    if signed_in[0] is None:
        authenticator: Authenticator = current_app.extensions["clerkhooks.auth"]
        if not (optional and "HTTP_AUTHORIZATION" not in environ and _find_cookie(authenticator) is None):
            authenticator.verifier.keys.require_any()  # without any key the answer is 503, whatever was sent
            signed_in = _verify(authenticator, find_token(authenticator))
        environ[SIGNED_IN] = signed_in
    return signed_in[0]


def _verify(authenticator: Authenticator, token: str) -> tuple[Session, users.UserSnapshot]:
    session = authenticator.verifier.verify(token, time.time())
    logs.annotate(user_id=session.user_id)
    return session, users.get_authenticated(session.user_id, impersonated=session.impersonated)


def _signed_in() -> SignedIn:
    if not has_request_context() or SIGNED_IN not in (environ := request.environ):
        raise RuntimeError("There is no signed-in user here. Put @require_auth below the route of this view.")
    return cast("SignedIn", environ[SIGNED_IN])


def get_user() -> users.UserSnapshot:
    """What ``current_user`` stands for, itself."""
    return cast("users.UserSnapshot", _signed_in()[1])


current_user = cast("users.UserSnapshot", LocalProxy(get_user))
"""The user of this call: a frozen copy of the row. ``db.session.get(User, current_user.id)`` gives the row."""

current_session = cast("Session", LocalProxy(lambda: _signed_in()[0]))
"""The session of this call, as its token says."""
