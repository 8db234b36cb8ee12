"""``/api/me`` and ``/api/me/presence``, as a browser uses them."""

from __future__ import annotations

import io
from datetime import datetime, timedelta

import pytest
from flask_cors import CORS
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from clerkhooks import current_session, current_user, require_auth
from clerkhooks.clerk.fake import clerk_id
from tests.conftest import MakeService
from tests.support import Service, deletion, user_event

ORIGIN = "https://app.example.com"


def test_shows_the_user(service: Service) -> None:
    """The response contains the row's values under the names that the front end uses."""
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
    """Later calls return the presence that was set."""
    user_id = clerk_id("user")
    for is_online in (True, False):
        assert (
            service.call(
                user_id, "PUT", "/api/me/presence", body={"isOnline": is_online}
            ).get_json()["isOnline"]
            is is_online
        )
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
def test_refuses_a_malformed_presence(service: Service, body: bytes, reason: str) -> None:
    """A body without a boolean gets a 400, or a 413 if it is too large. Nothing changes."""
    user_id = clerk_id("user")
    service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": True})
    response = service.http.put(
        "/api/me/presence",
        input_stream=io.BytesIO(body),
        headers={"Authorization": f"Bearer {service.clerk.session_token(user_id)}"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    status = 413 if reason == "body_too_large" else 400
    assert (response.status_code, response.get_json()["reason"]) == (status, reason)
    assert service.user(user_id, ["is_online"]) in ((True,), (1,))


def test_refuses_the_presence_of_an_impersonator(service: Service) -> None:
    """An impersonator may read the user but not set the user's presence."""
    user_id = clerk_id("user")
    service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": True})
    actor = {"sub": "user_2support"}
    assert service.call(user_id, act=actor).status_code == 200
    response = service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": False}, act=actor)
    expected = (403, "impersonation_not_allowed")
    assert (response.status_code, response.get_json()["reason"]) == expected
    assert service.call(user_id).get_json()["isOnline"] is True


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Token abc"]
)
def test_asks_for_a_token(service: Service, authorization: str | None) -> None:
    """Without a bearer token, the response is 401, and ``WWW-Authenticate`` is ``Bearer``."""
    response = service.http.get(
        "/api/me", headers={"Authorization": authorization} if authorization is not None else {}
    )
    assert (response.status_code, response.get_json()["reason"]) == (401, "token_missing")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_accepts_the_scheme_in_any_case(service: Service, scheme: str) -> None:
    """The authentication scheme is case-insensitive (RFC 9110)."""
    token = service.clerk.session_token(clerk_id("user"))
    assert (
        service.http.get("/api/me", headers={"Authorization": f"{scheme} {token}"}).status_code
        == 200
    )


@pytest.mark.parametrize(("claims", "reason"), [
    ({"exp": 1}, "token_expired"),
    ({"azp": "https://evil.example.com"}, "token_authorized_party_mismatch"),
    ({"azp": None}, "token_authorized_party_missing"),
    ({"iss": "https://other.example.com"}, "token_issuer_mismatch"),
    ({"sts": "pending"}, "session_pending"),
    ({"sid": None}, "token_session_missing"),
    ({"header": {"cat": "cl_B7d4PD222AAA"}}, "token_category_mismatch"),
    ({"header": {"typ": "at+jwt"}}, "token_type_mismatch"),
])  # fmt: skip
def test_refuses_an_invalid_token(service: Service, claims: dict[str, object], reason: str) -> None:
    """An invalid token gets a 401 with a specific reason, and no user is created."""
    response = service.call(clerk_id("user"), **claims)  # type: ignore[arg-type]
    assert (response.status_code, response.get_json()["reason"]) == (401, reason)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert service.rows("SELECT count(*) FROM users") == [(0,)]


def test_refuses_a_token_of_a_deleted_user(service: Service) -> None:
    """A valid token of a deleted user gets a 401 and does not restore the user."""
    user_id = clerk_id("user")
    service.outcome(deletion(user_id))
    for method, path in (("GET", "/api/me"), ("PUT", "/api/me/presence")):
        response = service.call(user_id, method, path, body={"isOnline": True})
        assert (response.status_code, response.get_json()["reason"]) == (401, "user_deleted")
    assert service.user(user_id, ["name"]) == ("Deleted User",)


@given(
    authorization=st.text(
        st.characters(max_codepoint=255, exclude_characters="\r\n\x00"), max_size=80
    ),
    path=st.text(max_size=20),
)
def test_never_answers_a_stranger_with_a_5xx(
    service: Service, authorization: str, path: str
) -> None:
    """Malformed headers get a 401, and no path causes a 5xx response."""
    assert (
        service.http.get(
            "/api/me", headers={"Authorization": f"Bearer {authorization}"}
        ).status_code
        == 401
    )
    assert service.http.get("/" + path.lstrip("/\\")).status_code < 500


def test_answers_503_without_keys(make_service: MakeService) -> None:
    """Without a session key, webhooks are processed, and protected routes return 503."""
    bare = make_service(
        CLERK_JWT_KEY=None, CLERK_PUBLISHABLE_KEY=None, CLERK_AUTHORIZED_PARTIES=None
    )
    assert bare.outcome(user_event(clerk_id("user"))) == "applied"
    response = bare.call(clerk_id("user"))
    assert (response.status_code, response.get_json()["reason"]) == (503, "keys_not_configured")
    assert int(response.headers["Retry-After"]) > 0
    assert not allowed(preflight(bare, ORIGIN))


@pytest.mark.parametrize("origin", [ORIGIN, "http://[::1]:3000"])
def test_allows_authorized_origins(make_service: MakeService, origin: str) -> None:
    """Preflight, success and error responses have the CORS headers that a browser needs."""
    service = make_service(CLERK_AUTHORIZED_PARTIES=f"{ORIGIN},http://[::1]:3000")
    allowance = preflight(service, origin)
    assert allowance.status_code == 200
    assert allowance.headers["Access-Control-Allow-Origin"] == origin
    assert "PUT" in allowance.headers["Access-Control-Allow-Methods"]
    assert allowance.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    token = service.clerk.session_token(clerk_id("user"))
    for headers, status in (({"Authorization": f"Bearer {token}"}, 200), ({}, 401)):
        answer = service.http.get("/api/me", headers={"Origin": origin, **headers})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (
            status,
            origin,
        )
        assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example.com",
        "null",
        "https://app.example.com.evil.org",
        "https://appxexample.com",
        "http://app.example.com",
    ],
)
def test_allows_no_other_origin(service: Service, origin: str) -> None:
    """Other origins get no CORS headers, and neither do other routes."""
    assert not allowed(preflight(service, origin))
    assert not allowed(service.http.get("/api/me", headers={"Origin": origin}))
    assert not allowed(service.http.get("/api/me"))
    assert not allowed(service.http.post("/webhooks/clerk", headers={"Origin": ORIGIN}))


def test_sends_one_cors_header_beside_flask_cors(service: Service) -> None:
    """Even with ``CORS(app)``, there is only one Access-Control-Allow-Origin header."""
    CORS(service.app)
    service.app.add_url_rule("/open", view_func=lambda: "open")
    answers = {
        path: service.http.get(path, headers={"Origin": ORIGIN}) for path in ("/api/me", "/open")
    }
    assert [
        len(answer.headers.getlist("Access-Control-Allow-Origin")) for answer in answers.values()
    ] == [1, 1]
    assert not allowed(service.http.get("/api/me", headers={"Origin": "https://evil.example.com"}))


def test_does_not_allow_native_as_an_origin(make_service: MakeService) -> None:
    """The value ``native`` admits tokens without ``azp``; it is not a CORS origin."""
    service = make_service(CLERK_AUTHORIZED_PARTIES=f"native,{ORIGIN}")
    assert service.call(clerk_id("user"), azp=None).status_code == 200
    assert allowed(preflight(service, ORIGIN))
    assert not allowed(preflight(service, "native"))


def test_protects_views_of_an_application(service: Service) -> None:
    """A protected view can read the user and the session, and keeps its name and arguments."""

    @service.app.get("/notes/<int:number>")
    @require_auth
    def note(number: int) -> dict[str, object]:
        return {
            "number": number,
            "user": current_user.id,
            "session": current_session.user_id,
            "actor": current_session.actor,
        }

    user_id, actor = clerk_id("user"), {"sub": "user_admin"}
    expected = {"number": 7, "user": user_id, "session": user_id, "actor": actor}
    assert service.call(user_id, path="/notes/7", act=actor).get_json() == expected
    assert note.__name__ == "note"


def test_explains_a_view_that_is_not_protected(service: Service) -> None:
    """Reading ``current_user`` without ``require_auth`` raises an error that names the remedy."""
    with service.app.test_request_context(), pytest.raises(RuntimeError, match="@require_auth"):
        _ = current_user.id


def preflight(service: Service, origin: str) -> TestResponse:
    """Send the preflight request that precedes a cross-origin call with a token."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return service.http.options("/api/me/presence", headers=headers)


def allowed(response: TestResponse) -> list[str]:
    """Return the names of a response's CORS headers."""
    return [name for name, _ in response.headers if name.startswith("Access-Control-Allow")]
