"""``@require_auth``, ``current_user`` and ``current_session``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, Unpack, cast, overload

from flask import Flask, current_app, has_request_context, request, request_started
from werkzeug.local import LocalProxy

from clerkhooks.clerk.authorization import Conditions, check_conditions
from clerkhooks.clerk.session_tokens import Session, SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import ConfiguredKeys, FetchedKeys
from clerkhooks.errors import Forbidden, RequestError
from clerkhooks.parsing import NATIVE
from clerkhooks.settings import Settings
from clerkhooks.store.models import ClerkUser
from clerkhooks.web.membership import TABLES_MISSING, check_membership
from clerkhooks.web.sign_in import sign_in
from clerkhooks.web.state import EXTENSION, Authenticator, request_state

P = ParamSpec("P")
R = TypeVar("R")
_IS_PROTECTED = "_clerkhooks_is_protected"
_ORGANIZATION = "_clerkhooks_organization"


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
    """
    Return the configured keys. If no keys are configured, return keys fetched from Clerk.

    The Frontend API takes precedence over the Backend API.
    """
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
    Return the names of the cookies that may contain a token, in order of precedence.

    Without authorized parties, no cookie is accepted: browsers also send cookies with forged
    requests, and only ``azp`` and ``Origin`` show which page sent a request.
    """
    if not any(party != NATIVE for party in settings.authorized_parties):
        return ()
    if settings.publishable_key is None:
        return ("__session",)
    digest = hashlib.sha1(settings.publishable_key.encode(), usedforsecurity=False).digest()
    return (f"__session_{base64.urlsafe_b64encode(digest).decode()[:8]}", "__session")


def fetch_keys_soon(app: Flask) -> None:
    """Unless keys are configured, start fetching them before the first call needs them."""
    keys = app.extensions[EXTENSION].authenticator.verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.fetch_soon()


@dataclass(frozen=True)
class Protection:
    """The result of ``require_auth(…)``, to use as a decorator or ``before_request`` function."""

    conditions: Conditions
    optional: bool = False
    organization: str | None = None
    """The path parameter with the id of an organization whose members are admitted."""

    @overload
    def __call__(self, view: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def __call__(self) -> None: ...
    def __call__(self, *views: Any) -> Any:
        """Protect the given view, or check the current request if no view is given."""
        if not views:
            # A browser's preflight request has no token. Flask responds to it automatically.
            is_automatic = getattr(request.url_rule, "provide_automatic_options", False)
            return None if request.method == "OPTIONS" and is_automatic else self.check()
        (view,) = views
        if not callable(view) or isinstance(view, type):
            raise TypeError(
                "require_auth protects a view function. "
                "For a MethodView, put it in the class's decorators or on the methods."
            )

        is_async = iscoroutinefunction(view)

        @wraps(view)
        def protected(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return (current_app.ensure_sync(view) if is_async else view)(*args, **kwargs)

        _mark_protected(view, protected)
        if self.organization is not None:
            vars(protected)[_ORGANIZATION] = self.organization
        return protected

    def check(self) -> None:
        """
        Authenticate the caller and check the conditions.

        Raises:
            Unauthenticated, Forbidden, KeysUnavailable: the responses are 401, 403 and 503.
        """
        call = request_state()
        metrics = call.app_state.metrics
        try:
            self._authorize(sign_in(call, optional=self.optional))
        except RequestError as error:
            if metrics is not None:
                metrics.sessions_refused.labels(error.reason).inc()
            raise
        if metrics is not None and call.session is not None:
            metrics.sessions_verified.inc()

    def _authorize(self, session: Session | None) -> None:
        if session is None or not (self.conditions or self.organization):
            return
        conditions = check_membership(session, self.conditions, self.organization)
        if not conditions or session.has(**conditions):
            return
        others = conditions.copy()
        reverification = others.pop("reverification", None)
        if reverification is not None and (not others or session.has(**others)):
            raise Forbidden("reverification_required", reverification)
        raise Forbidden("forbidden")


@overload
def require_auth(view: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def require_auth(
    *, optional: bool = False, organization: str | None = None, **conditions: Unpack[Conditions]
) -> Protection: ...
def require_auth(
    view: Callable[..., Any] | None = None,
    /,
    *,
    optional: bool = False,
    organization: str | None = None,
    **conditions: Unpack[Conditions],
) -> Callable[..., Any] | Protection:
    """
    Let only signed-in users call a view; set ``current_user`` and ``current_session``.

    Use ``@require_auth`` alone, or with the conditions that ``current_session.has`` accepts:
    ``@require_auth(role="org:admin")``. Put it below the route decorator. For a MethodView, put it
    in ``decorators`` or on the methods. For a whole blueprint, use
    ``blueprint.before_request(require_auth())``.

    With ``CLERK_TABLES=organizations``, ``organization="organization_id"`` admits only members of
    the organization whose id is in this path parameter. Then ``role`` is the role in it. Routes
    without the parameter are found when the application starts, except in ``before_request``, where
    their response is a 403.

    With ``optional=True``, anonymous callers and callers with an expired cookie are admitted. Other
    invalid tokens are still refused. In such a view, use ``hooks.optional_user`` and
    ``hooks.optional_session``, which may be None.

    Raises:
        Unauthenticated: the token is missing or invalid. The response is a 401 with the reason.
        Forbidden: the session does not meet the conditions. The response is a 403.
        KeysUnavailable: no key is available to verify the token. The response is a 503.
        TypeError, ValueError: a condition is invalid. Raised when the view is defined.
    """
    checked = check_conditions(conditions)
    if optional and (checked or organization is not None):
        raise ValueError(
            "optional=True cannot be combined with conditions. "
            "Call hooks.optional_session.has() inside the view instead."
        )
    protection = Protection(checked, optional, organization)
    return protection if view is None else protection(view)


def refuse_unprotected(app: Flask, **_: object) -> None:
    """
    Refuse to set up or serve an application with ``require_auth`` above a route decorator.

    The view of that route would be public. If ``require_auth`` is between two route decorators,
    only one of the routes would be public.

    Raises:
        RuntimeError: a view was protected only after it was registered, or a view needs an
            organization that the route or the configuration lacks.
    """
    for endpoint, view in app.view_functions.items():
        for each in (view, *_find_methods(view)):
            _check_organization(app, endpoint, getattr(each, "__dict__", {}).get(_ORGANIZATION))
        is_bare = getattr(view, "__dict__", {}).get(_IS_PROTECTED, False)
        if is_bare and not _is_guarded(app, endpoint):
            raise RuntimeError(
                f"The view of {endpoint!r} is public, because @require_auth is above the route. "
                "Put it below the route, so that the route gets the protected view. "
                "If the route is meant to be public, give it a separate function."
            )
    request_started.disconnect(refuse_unprotected, app)


def _find_methods(view: Any) -> list[Any]:
    """Return the methods of a MethodView, which may be protected separately."""
    view_class = getattr(view, "view_class", None)
    names = getattr(view_class, "methods", None) or ()
    return [getattr(view_class, name.lower(), None) for name in names]


def _check_organization(app: Flask, endpoint: str, parameter: str | None) -> None:
    if parameter is None:
        return
    if app.extensions[EXTENSION].store.memberships is None:
        raise RuntimeError(TABLES_MISSING)
    for rule in app.url_map.iter_rules(endpoint):
        if parameter not in rule.arguments:
            raise RuntimeError(
                f"The route {rule.rule!r} has no parameter {parameter!r}, which "
                "require_auth(organization=…) needs."
            )


def _is_guarded(app: Flask, endpoint: str) -> bool:
    """Return whether the application or a blueprint of *endpoint* requires a session."""
    parts = endpoint.split(".")[:-1]
    names = [None, *(".".join(parts[: end + 1]) for end in range(len(parts)))]
    functions = [one for name in names for one in app.before_request_funcs.get(name, ())]
    return any(isinstance(one, Protection) and not one.optional for one in functions)


def _mark_protected(view: Callable[..., Any], protected: Callable[..., Any]) -> None:
    """Mark *view* and the functions it wraps, so that unprotected routes can be detected."""
    vars(protected).pop(_IS_PROTECTED, None)  # wraps() copies the mark of a protected view
    inner: Any = view
    while inner is not None:
        if hasattr(inner, "__dict__"):
            vars(inner)[_IS_PROTECTED] = True
        inner = getattr(inner, "__wrapped__", None)


def _state() -> Any:
    state = request_state() if has_request_context() else None
    if state is None or not state.is_authenticated:
        raise RuntimeError(
            "There is no signed-in user here. Put @require_auth below the route of this view."
        )
    return state


def get_user() -> ClerkUser:
    """Return the current user itself instead of a proxy."""
    return cast("ClerkUser", _state().user)


def get_session() -> Session:
    """Return the current session itself instead of a proxy."""
    return cast("Session", _state().session)


current_user = cast("ClerkUser", LocalProxy(get_user))
"""The current caller: a frozen copy of the row. ``hooks.current_user`` has your model's type."""

current_session = cast("Session", LocalProxy(get_session))
"""The session of the current caller, from its token."""
