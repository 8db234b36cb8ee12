"""Tests of ``require_auth``: its forms, its conditions, and the sources of the token."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint
from flask.typing import ResponseReturnValue
from flask.views import MethodView

from clerkhooks import current_session, current_user, require_auth
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.service import db, hooks
from tests.conftest import MakeService
from tests.racing import on_statement
from tests.support import Service, deletion

ORIGIN = "https://app.example.com"
ADMIN: dict[str, Any] = {
    "o": {"id": "org_1", "slg": "acme", "rol": "admin", "per": "read", "fpm": "1"},
    "fea": "o:notes",
}


def view() -> dict[str, Any]:
    """Return the caller's user id and session id."""
    return {
        "user": current_user.id if current_user else None,
        "session": current_session.id if current_session else None,
    }


def add_view(service: Service, decorate: Callable[..., Any], path: str = "/view") -> str:
    """Add a view decorated with *decorate*, and return its path."""
    service.app.add_url_rule(path, path, decorate(view), methods=["GET", "POST"])
    return path


@pytest.mark.parametrize("form", ["bare", "called"])
def test_protects_a_function(service: Service, form: str) -> None:
    """The decorator works with and without parentheses."""
    path = add_view(service, require_auth if form == "bare" else require_auth())
    user_id = clerk_id("user")
    assert service.call(user_id, path=path, sid="sess_7").get_json() == {
        "user": user_id,
        "session": "sess_7",
    }
    assert service.http.get(path).status_code == 401


def test_protects_an_async_view(service: Service) -> None:
    """A decorated async view works: Flask runs the coroutine."""

    async def later() -> dict[str, Any]:
        await asyncio.sleep(0)
        return view()

    service.app.add_url_rule("/later", view_func=require_auth(later))
    assert service.call(clerk_id("user"), path="/later").status_code == 200


def test_protects_a_method_view(service: Service) -> None:
    """The decorator works in a MethodView's ``decorators`` and on a single method."""

    class Guarded(MethodView):
        decorators = [require_auth]  # noqa: RUF012

        def get(self) -> ResponseReturnValue:
            return view()

    class Partly(MethodView):
        def get(self) -> ResponseReturnValue:
            return {"open": True}

        @require_auth(role="org:admin")
        def post(self) -> ResponseReturnValue:
            return view()

    service.app.add_url_rule("/guarded", view_func=Guarded.as_view("guarded"))
    service.app.add_url_rule("/partly", view_func=Partly.as_view("partly"))
    user_id = clerk_id("user")
    assert (
        service.http.get("/guarded").status_code,
        service.call(user_id, path="/guarded").status_code,
    ) == (401, 200)
    assert (service.http.get("/partly").status_code, service.http.post("/partly").status_code) == (
        200,
        401,
    )
    assert service.call(user_id, "POST", "/partly").status_code == 403
    assert service.call(user_id, "POST", "/partly", **ADMIN).status_code == 200


@pytest.mark.parametrize(
    "guard", [require_auth(), require_auth(role="org:admin")], ids=["called", "with a role"]
)
def test_protects_a_blueprint(service: Service, guard: Any) -> None:
    """A CORS preflight needs no token. A view can have stricter conditions than its blueprint."""
    blueprint = Blueprint("guarded", __name__, url_prefix="/api/guarded")
    blueprint.before_request(guard)
    blueprint.add_url_rule("/", view_func=view)
    blueprint.add_url_rule("/admin", "admin", require_auth(role="org:admin")(view))
    service.app.register_blueprint(blueprint)
    user_id = clerk_id("user")
    assert service.http.get("/api/guarded/").status_code == 401
    assert service.call(user_id, path="/api/guarded/", **ADMIN).get_json()["user"] == user_id
    assert service.call(user_id, path="/api/guarded/admin", **ADMIN).status_code == 200
    assert service.call(user_id, path="/api/guarded/admin").status_code == 403
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
    preflight = service.http.options("/api/guarded/", headers=headers)
    assert preflight.status_code == 200
    assert not any(name.startswith("Access-Control-") for name, _ in preflight.headers)


def test_admits_an_anonymous_caller_of_an_optional_view(service: Service) -> None:
    """A call without a token has no user. A call with an invalid bearer token is refused."""
    path = add_view(service, require_auth(optional=True))
    user_id = clerk_id("user")
    assert service.http.get(path).get_json() == {"user": None, "session": None}
    assert service.call(user_id, path=path).get_json()["user"] == user_id
    assert service.call(user_id, path=path, exp=1).get_json()["reason"] == "token_expired"
    assert service.http.get(path, headers={"Authorization": "Basic x"}).get_json()["user"] is None
    for bearer in ("Bearer", "Bearer ", "Bearer a.b.c"):
        assert service.http.get(path, headers={"Authorization": bearer}).status_code == 401
    service.outcome(deletion(user_id))
    assert service.call(user_id, path=path).get_json()["reason"] == "user_deleted"


def test_requires_a_session_inside_an_optional_blueprint(service: Service) -> None:
    """A view can require a session even if its blueprint admits anonymous callers."""
    blueprint = Blueprint("mixed", __name__)
    blueprint.before_request(require_auth(optional=True))
    blueprint.add_url_rule("/mixed", view_func=require_auth(view))
    service.app.register_blueprint(blueprint)
    assert service.http.get("/mixed").get_json()["reason"] == "token_missing"
    assert service.call(clerk_id("user"), path="/mixed").status_code == 200


@pytest.mark.parametrize(
    ("condition", "enough"),
    [
        ({"role": "org:admin"}, ADMIN),
        ({"permission": "org:notes:read"}, ADMIN),
        ({"feature": "org:notes"}, ADMIN),
        ({"plan": "pro"}, {"pla": "u:pro"}),
        ({"role": "admin", "plan": "pro"}, ADMIN | {"pla": "o:pro"}),
    ],
)
def test_refuses_an_insufficient_session(
    service: Service, condition: dict[str, str], enough: dict[str, Any]
) -> None:
    """The status is 401 without a session, 403 if ``has()`` is false, and 200 if it is true."""
    path = add_view(service, require_auth(**condition))  # type: ignore[call-overload]
    user_id = clerk_id("user")
    assert service.http.get(path).status_code == 401
    refused = service.call(user_id, path=path)
    assert (
        refused.status_code,
        refused.get_json()["reason"],
        "clerk_error" in refused.get_json(),
    ) == (403, "forbidden", False)
    assert service.call(user_id, path=path, **enough).status_code == 200


def test_requests_reverification_in_clerks_format(service: Service) -> None:
    """
    The response body has the format that Clerk's front-end libraries expect.

    If a role is missing as well, the response reports only the missing role.
    """
    plain = add_view(service, require_auth(reverification="strict"))
    both = add_view(
        service,
        require_auth(role="org:admin", reverification={"level": "first_factor", "afterMinutes": 5}),
        "/both",
    )
    user_id = clerk_id("user")
    body = service.call(user_id, path=plain, fva=[99, -1]).get_json()
    metadata = {"reverification": "strict"}
    assert body["clerk_error"] == {
        "type": "forbidden",
        "reason": "reverification-error",
        "metadata": metadata,
    }
    assert (body["status"], body["reason"]) == (403, "reverification_required")
    assert service.call(user_id, path=plain, fva=[9, -1]).status_code == 200
    assert service.call(user_id, path=both, fva=[9, -1]).get_json()["reason"] == "forbidden"
    error = service.call(user_id, path=both, fva=[9, -1], **ADMIN).get_json()["clerk_error"]
    assert error["metadata"]["reverification"] == {"level": "first_factor", "afterMinutes": 5}


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: require_auth(rôle="org:admin"),  # type: ignore[call-overload]
        lambda: require_auth(reverification="stict"),  # type: ignore[call-overload]
        lambda: require_auth(role=["org:admin"]),  # type: ignore[call-overload]
        lambda: require_auth(permission="notes"),
        lambda: require_auth(permission="org:sys_memberships:read"),
        lambda: require_auth(role=" "),
        lambda: require_auth(plan="org:"),
        lambda: require_auth(reverification={"level": "first_factor", "afterMinutes": 5, "x": 1}),  # type: ignore[call-overload]
        lambda: require_auth(
            reverification={"level": "first_factor", "afterMinutes": float("inf")}
        ),
        lambda: require_auth("org:admin"),  # type: ignore[call-overload]
        lambda: require_auth(MethodView),
        lambda: require_auth(optional=True, role="org:admin"),
    ],
)
def test_fails_on_misuse_when_the_view_is_defined(misuse: Callable[[], object]) -> None:
    """Incorrect arguments raise an error at import, not when the view is first called."""
    with pytest.raises((TypeError, ValueError)):
        misuse()


def test_forgets_the_caller_after_the_request(service: Service) -> None:
    """The next request has no user, even if both requests share an application context."""
    ada, eve = clerk_id("user"), clerk_id("user")
    with service.app.app_context():
        assert [service.call(user_id).get_json()["id"] for user_id in (ada, eve)] == [ada, eve]
        assert service.http.get("/api/me").status_code == 401
        assert (
            service.http.get("/api/me", headers={"Authorization": "Bearer garbage"}).status_code
            == 401
        )


def test_decorates_during_a_request(service: Service) -> None:
    """A view can be decorated during a request, for example when its module is imported late."""
    with service.app.test_request_context():
        assert callable(require_auth(role="org:admin")(view))


def cookie_suffix(service: Service) -> str:
    """Return the suffix that Clerk's front end adds to the names of its cookies."""
    digest = hashlib.sha1(service.clerk.environ["CLERK_PUBLISHABLE_KEY"].encode()).digest()
    return base64.urlsafe_b64encode(digest).decode()[:8]


def by_cookie(
    service: Service,
    name: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    **claims: Any,
) -> int:
    """Call the API with a token in the cookie *name*, and return the status."""
    token = service.clerk.session_token(clerk_id("user"), **claims)
    path = "/api/me" if method == "GET" else "/api/me/presence"
    body = {"isOnline": True} if method == "PUT" else None
    sent = {"Cookie": f"{name}={token}"} | (headers or {})
    return (
        service.app.test_client(use_cookies=False)
        .open(path, method=method, json=body, headers=sent)
        .status_code
    )


def test_accepts_the_first_cookie_that_verifies(service: Service) -> None:
    """Cookies with the instance's suffix or without a suffix are accepted; others are not."""
    own = f"__session_{cookie_suffix(service)}"
    assert by_cookie(service, own) == by_cookie(service, "__session") == 200
    assert by_cookie(service, "__session_AAAAAAAA") == by_cookie(service, "__client") == 401
    assert by_cookie(service, "__session", azp="https://evil.example.com") == 401
    bad, good = "a.b.c", service.clerk.session_token(clerk_id("user"))
    http = service.app.test_client(use_cookies=False)
    stale = service.clerk.session_token(clerk_id("user"), exp=1)
    for cookies, status in (
        (f"{own}={good}; __session={bad}", 200),
        (f"{own}={bad}; __session={good}", 200),
        (f"{own}={stale}; __session={good}", 200),
        (f"{own}={stale}; __session={bad}", 401),
    ):
        assert http.get("/api/me", headers={"Cookie": cookies}).status_code == status


def test_prefers_a_bearer_token_over_a_cookie(service: Service) -> None:
    """A bearer token wins even if it is invalid. A ``Basic`` header does not hide the cookie."""
    for authorization in ("Bearer a.b.c", "bearer x", "Bearer", "Bearer "):
        assert by_cookie(service, "__session", headers={"Authorization": authorization}) == 401
    for authorization in ("Basic x", "", "Digest"):
        assert by_cookie(service, "__session", headers={"Authorization": authorization}) == 200


def test_treats_an_expired_cookie_as_anonymous_if_optional(service: Service) -> None:
    """An expired cookie is ignored. Forged cookies and expired bearer tokens are refused."""
    path = add_view(service, require_auth(optional=True))
    http = service.app.test_client(use_cookies=False)
    expired = service.clerk.session_token(clerk_id("user"), exp=1)
    forged = FakeClerk().session_token(clerk_id("user"), exp=1)
    response = http.get(path, headers={"Cookie": f"__session={expired}"})
    assert response.get_json() == {"user": None, "session": None}
    own = f"__session_{cookie_suffix(service)}"
    for cookies in (
        f"__session={forged}",
        f"{own}={expired}; __session={forged}",
        f"{own}={forged}; __session={expired}",
    ):
        assert http.get(path, headers={"Cookie": cookies}).status_code == 401
    assert http.get(path, headers={"Authorization": f"Bearer {expired}"}).status_code == 401
    assert http.get("/api/me", headers={"Cookie": f"__session={expired}"}).status_code == 401


def test_admits_native_apps(make_service: MakeService) -> None:
    """A native app's bearer token needs no ``azp``. A cookie without ``azp`` is refused."""
    service = make_service(CLERK_AUTHORIZED_PARTIES=f"native {ORIGIN}")
    assert service.call(clerk_id("user"), azp=None).status_code == 200
    assert service.call(clerk_id("user"), azp="https://evil.example.com").status_code == 401
    assert by_cookie(service, "__session") == 200
    assert by_cookie(service, "__session", azp=None) == 401
    alone = make_service(CLERK_AUTHORIZED_PARTIES="native")
    assert alone.call(clerk_id("user"), azp=None).status_code == 200
    assert alone.call(clerk_id("user")).get_json()["reason"] == "token_authorized_party_mismatch"
    assert by_cookie(alone, "__session") == by_cookie(alone, "__session", azp=None) == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [(ORIGIN, 200), ("https://evil.example.com", 403), ("null", 403), (None, 403)],
)
def test_requires_an_origin_for_an_unsafe_method_by_cookie(
    service: Service, origin: str | None, status: int
) -> None:
    """A forged cross-site request has a valid cookie, so an unsafe method needs an ``Origin``."""
    headers = {"Origin": origin} if origin else {}
    assert by_cookie(service, "__session", "PUT", headers) == status
    assert by_cookie(service, "__session", "GET", headers) == 200


def test_ignores_cookies_without_authorized_parties(make_service: MakeService) -> None:
    """Without authorized parties, cookies are refused, because any site could send them."""
    assert by_cookie(make_service(CLERK_AUTHORIZED_PARTIES=None), "__session") == 401


def test_accepts_the_plain_cookie_without_a_publishable_key(make_service: MakeService) -> None:
    """Without a publishable key, the cookie's suffix is unknown; the plain name still works."""
    service = make_service(CLERK_PUBLISHABLE_KEY=None)
    assert by_cookie(service, "__session") == 200


def test_leaves_the_transaction_to_the_view(service: Service) -> None:
    """Authentication does not begin or commit a transaction in ``db.session``."""

    def write() -> dict[str, Any]:
        assert not db.session().in_transaction()
        db.session.get_one(hooks.model, current_user.id).name = "Never committed"
        db.session.flush()
        return {}

    service.app.add_url_rule("/write", view_func=require_auth(write))
    user_id = clerk_id("user")
    assert service.call(user_id, path="/write").status_code == 200
    assert service.user(user_id, ["name"]) == ("New User",)


def test_queries_the_database_once(service: Service) -> None:
    """A call by a user who was seen recently executes one database statement."""
    user_id = clerk_id("user")
    service.call(user_id)
    statements: list[None] = []
    with on_statement(service, "", lambda: statements.append(None)):
        assert service.call(user_id).status_code == 200
    assert len(statements) == 1
