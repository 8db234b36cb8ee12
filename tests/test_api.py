"""/api/me and the decorator in front of it, as a browser meets them."""

from __future__ import annotations

import io
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from clerkhooks import current_session, current_user, require_auth
from clerkhooks.cli.pretend import clerk_id
from tests.conftest import MakeService
from tests.support import Service, deletion, user_event

ORIGIN = "https://app.example.com"


def test_shows_the_user(service: Service) -> None:
    """The row, in the front end's names."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    response = service.call(user_id)
    assert response.headers["Cache-Control"] == "no-store"
    shown = response.get_json()
    last_seen = shown.pop("lastSeen")
    assert shown == {
        "id": user_id,
        "email": "ada@example.org",
        "name": "Ada Lovelace",
        "imageUrl": f"https://img.clerk.com/{user_id}",
        "isOnline": False,
    }
    assert last_seen.endswith("Z")
    assert datetime.fromisoformat(last_seen).utcoffset() == timedelta(0)


def test_sets_and_shows_presence(service: Service) -> None:
    """The presence that is put is what is shown."""
    user_id = clerk_id("user")
    for is_online in (True, False):
        assert service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": is_online}).get_json()["isOnline"] is is_online
        assert service.call(user_id).get_json()["isOnline"] is is_online


@pytest.mark.parametrize(("body", "reason"), [
    (b"", "body_not_json"),
    (b"{", "body_not_json"),
    (b"[" * 100_000, "body_not_json"),
    (b"[]", "is_online_not_a_boolean"),
    (b"{}", "is_online_not_a_boolean"),
    (b'{"isOnline": 1}', "is_online_not_a_boolean"),
    (b'{"isOnline": "true"}', "is_online_not_a_boolean"),
    (b'{"isOnline": true}' + b" " * 2**20, "body_too_large"),
])  # fmt: skip
def test_refuses_a_presence_that_is_none(service: Service, body: bytes, reason: str) -> None:
    """Anything but a boolean is 400 and changes nothing."""
    headers = {"Authorization": f"Bearer {service.clerk.session_token(clerk_id('user'))}"}
    response = service.http.put(
        "/api/me/presence", input_stream=io.BytesIO(body), headers=headers, environ_overrides={"wsgi.input_terminated": True}
    )
    assert (response.status_code, response.get_json()["reason"]) == (413 if reason == "body_too_large" else 400, reason)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Token abc"])
def test_asks_for_a_token(service: Service, authorization: str | None) -> None:
    """Without a bearer token the answer is 401 and names the scheme."""
    response = service.http.get("/api/me", headers={"Authorization": authorization} if authorization is not None else {})
    assert (response.status_code, response.get_json()["reason"]) == (401, "token_missing")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_takes_the_scheme_in_any_case(service: Service, scheme: str) -> None:
    """RFC 9110: the scheme's case means nothing."""
    token = service.clerk.session_token(clerk_id("user"))
    assert service.http.get("/api/me", headers={"Authorization": f"{scheme} {token}"}).status_code == 200


@pytest.mark.parametrize(("claims", "reason"), [
    ({"exp": 1}, "token_expired"),
    ({"azp": "https://evil.example.com"}, "token_authorized_party_mismatch"),
    ({"azp": None}, "token_authorized_party_mismatch"),
    ({"iss": "https://other.example.com"}, "token_issuer_mismatch"),
    ({"sts": "pending"}, "session_pending"),
    ({"sid": None}, "token_session_missing"),
    ({"header": {"cat": "cl_B7d4PD222AAA"}}, "token_category_mismatch"),
    ({"header": {"typ": "at+jwt"}}, "token_type_mismatch"),
])  # fmt: skip
def test_refuses_tokens_that_do_not_hold(service: Service, claims: dict[str, object], reason: str) -> None:
    """Each is 401 with its reason, and creates no user."""
    response = service.call(clerk_id("user"), **claims)  # type: ignore[arg-type]
    assert (response.status_code, response.get_json()["reason"]) == (401, reason)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert service.rows("SELECT count(*) FROM users") == [(0,)]


def test_refuses_a_token_that_outlived_its_user(service: Service) -> None:
    """A live token of a deleted user is 401 and does not revive them."""
    user_id = clerk_id("user")
    service.outcome(deletion(user_id))
    for method, path in (("GET", "/api/me"), ("PUT", "/api/me/presence")):
        response = service.call(user_id, method, path, body={"isOnline": True})
        assert (response.status_code, response.get_json()["reason"]) == (401, "user_deleted")
    assert service.user(user_id, ["name"]) == ("Deleted User",)


@given(authorization=st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\x00"), max_size=80), path=st.text(max_size=20))
def test_never_answers_a_stranger_with_a_5xx(service: Service, authorization: str, path: str) -> None:
    """Hostile headers and paths end in a 4xx."""
    assert service.http.get("/api/me", headers={"Authorization": f"Bearer {authorization}"}).status_code == 401
    assert service.http.get("/" + path.lstrip("/\\")).status_code < 500


def test_answers_503_without_keys(make_service: MakeService) -> None:
    """With no key for session tokens webhooks work, and protected routes say what is missing."""
    bare = make_service(CLERK_JWT_KEY=None, CLERK_PUBLISHABLE_KEY=None, CLERK_AUTHORIZED_PARTIES=None)
    assert bare.outcome(user_event(clerk_id("user"))) == "applied"
    response = bare.call(clerk_id("user"))
    assert (response.status_code, response.get_json()["reason"]) == (503, "keys_not_configured")
    assert int(response.headers["Retry-After"]) > 0
    assert not allowed(preflight(bare, ORIGIN))


@pytest.mark.parametrize("origin", [ORIGIN, "http://[::1]:3000"])
def test_lets_its_front_ends_call(make_service: MakeService, origin: str) -> None:
    """Preflight, answer and refusal carry what a browser of an authorized party needs."""
    service = make_service(CLERK_AUTHORIZED_PARTIES=f"{ORIGIN},http://[::1]:3000")
    asked = preflight(service, origin)
    assert asked.status_code == 200
    assert asked.headers["Access-Control-Allow-Origin"] == origin
    assert "PUT" in asked.headers["Access-Control-Allow-Methods"]
    assert asked.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    token = service.clerk.session_token(clerk_id("user"))
    for headers, status in (({"Authorization": f"Bearer {token}"}, 200), ({}, 401)):
        answer = service.http.get("/api/me", headers={"Origin": origin, **headers})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, origin)
        assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example.com", "null", "https://app.example.com.evil.org", "https://appxexample.com", "http://app.example.com"]
)
def test_lets_nobody_else_call(service: Service, origin: str) -> None:
    """Another origin gets no header that a browser would go by."""
    assert not allowed(preflight(service, origin))
    assert not allowed(service.http.get("/api/me", headers={"Origin": origin}))
    assert not allowed(service.http.get("/api/me"))
    assert not allowed(service.http.post("/webhooks/clerk", headers={"Origin": ORIGIN}))


def test_protects_views_of_an_application(service: Service) -> None:
    """Inside a protected view the user and the session are at hand, and the view keeps its name and arguments."""

    @service.app.get("/notes/<int:number>")
    @require_auth
    def note(number: int) -> dict[str, object]:
        return {"number": number, "user": current_user.id, "session": current_session.user_id, "actor": current_session.actor}

    user_id = clerk_id("user")
    expected = {"number": 7, "user": user_id, "session": user_id, "actor": {"sub": "user_admin"}}
    assert service.call(user_id, path="/notes/7", act={"sub": "user_admin"}).get_json() == expected
    assert note.__name__ == "note"


def test_explains_a_view_that_is_not_protected(service: Service) -> None:
    """Asking for the user where nobody signed in is a mistake of the programmer, who is told the fix."""
    with service.app.test_request_context(), pytest.raises(RuntimeError, match="@require_auth"):
        _ = current_user.id


def preflight(service: Service, origin: str) -> TestResponse:
    """What a browser asks before it sends a token across origins."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization,content-type"}
    return service.http.options("/api/me/presence", headers=headers)


def allowed(response: TestResponse) -> list[str]:
    """The CORS headers of an answer."""
    return [name for name, _ in response.headers if name.startswith("Access-Control-Allow")]
