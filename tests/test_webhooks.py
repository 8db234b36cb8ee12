"""``POST /webhooks/clerk``, as Svix uses it."""

from __future__ import annotations

import io
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from tests.conftest import MakeService
from tests.support import DATA, NOW_MS, Service, deletion, user_event

PAYLOADS = sorted(path.name for path in DATA.glob("user.*.json"))


def test_creates_updates_and_deletes(service: Service) -> None:
    """A sign-up, an update and a deletion are each applied."""
    user_id = clerk_id("user")
    assert service.outcome(user_event(user_id, "user.created", at=NOW_MS)) == "applied"
    profile = ("ada@example.org", "Ada Lovelace", f"https://img.clerk.com/{user_id}")
    assert service.user(user_id) == profile
    updated = user_event(user_id, at=NOW_MS + 1, first_name="Augusta")
    assert service.outcome(updated) == "applied"
    assert service.user(user_id, ["name"]) == ("Augusta Lovelace",)
    assert service.outcome(deletion(user_id, NOW_MS + 2)) == "applied"
    assert service.user(user_id) == (None, "Deleted User", None)


@pytest.mark.parametrize("name", PAYLOADS)
def test_applies_every_documented_payload(service: Service, name: str) -> None:
    """Each example from Clerk's documentation is applied to an empty table."""
    body = (DATA / name).read_bytes()
    assert service.outcome(body) == "applied"
    assert service.rows("SELECT count(*) FROM users") == [(1,)]


def test_answers_the_documented_shape(service: Service) -> None:
    """The response contains the outcome and the message id."""
    response = service.deliver(user_event(clerk_id("user")), "msg_1")
    assert response.get_json() == {"outcome": "applied", "messageId": "msg_1"}


def test_processes_a_message_once(service: Service) -> None:
    """A redelivery, which has a new timestamp, is a duplicate and changes nothing."""
    user_id = clerk_id("user")
    body = user_event(user_id)
    assert service.outcome(body, "msg_1") == "applied"
    service.rows(f"UPDATE users SET name = 'Touched' WHERE id = '{user_id}'")
    assert service.outcome(body, "msg_1", int(time.time()) + 5) == "duplicate"
    assert service.user(user_id, ["name"]) == ("Touched",)
    assert service.rows("SELECT outcome, attempts FROM webhook_messages") == [("applied", 1)]


def test_ignores_other_types(service: Service) -> None:
    """An event without a handler is accepted and recorded, and users are unchanged."""
    body = event_body("session.created", {"id": "sess_1"}, NOW_MS)
    assert [service.outcome(body, "msg_1") for _ in range(2)] == ["ignored", "duplicate"]
    stored = service.rows("SELECT event_type, outcome, clerk_user_id FROM webhook_messages")
    assert stored == [("session.created", "ignored", None)]
    assert service.rows("SELECT count(*) FROM users") == [(0,)]


def test_keeps_long_message_ids_apart(service: Service) -> None:
    """Ids that differ only beyond the stored length identify different messages."""
    for message_id in ("msg_" + "x" * 900 + "1", "msg_" + "x" * 900 + "2"):
        body = user_event(clerk_id("user"))
        answer = service.deliver(body, message_id).get_json()
        assert answer == {"outcome": "applied", "messageId": message_id}
        assert service.outcome(body, message_id) == "duplicate"
    assert service.rows("SELECT max(length(message_id)) FROM webhook_messages") == [(255,)]


def test_ignores_types_that_no_database_could_store(service: Service) -> None:
    """An overlong type or message id, or one with hostile characters, causes no error."""
    body = event_body("user.created\x00\ud800" + "x" * 5000, {}, NOW_MS)
    assert service.outcome(body, "msg_" + "ü" * 900) == "ignored"
    [(event_type, message_id)] = service.rows("SELECT event_type, message_id FROM webhook_messages")
    assert (len(event_type), len(message_id)) == (255, 255)


@pytest.mark.parametrize("path", ["/webhooks/clerk", "/webhooks/clerk/"])
def test_accepts_a_trailing_slash(service: Service, path: str) -> None:
    """A trailing slash does not cause a redirect, because Svix counts a redirect as a failure."""
    body = user_event(clerk_id("user"))
    assert (
        service.http.post(path, data=body, headers=service.clerk.headers(body)).status_code == 200
    )


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_refuses_other_methods(service: Service, method: str) -> None:
    """Methods other than POST return 405 with an ``Allow`` header."""
    response = service.http.open("/webhooks/clerk", method=method)
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    assert response.content_type == "application/problem+json"


def test_answers_a_bad_signature_with_401(service: Service) -> None:
    """A body that was modified after signing is refused with a reason, and nothing is written."""
    body = user_event(clerk_id("user"))
    response = service.http.post(
        "/webhooks/clerk", data=body + b" ", headers=service.clerk.headers(body)
    )
    assert response.status_code == 401
    assert response.get_json() == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "reason": "signature_mismatch",
    }
    assert service.rows("SELECT count(*) FROM webhook_messages") == [(0,)]


def test_answers_missing_headers_with_401(service: Service) -> None:
    """A request without Svix's headers is refused before its body is decoded."""
    response = service.http.post("/webhooks/clerk", data=b"\xff")
    assert (response.status_code, response.get_json()["reason"]) == (
        401,
        "signature_headers_missing",
    )


BAD_EVENTS = {
    b"": "body_not_json",
    b"{": "body_not_json",
    b"[" * 100_000: "body_not_json",
    b'{"type": "user.created", "data": NaN}': "body_not_json",
    b"[]": "body_not_an_object",
    b'{"data": {"id": "user_1"}}': "event_type_missing",
    b'{"type": "", "data": {"id": "user_1"}}': "event_type_missing",
    b'{"type": 5}': "event_type_missing",
    b'{"type": "user.created"}': "user_id_malformed",
    b'{"type": "user.updated", "data": []}': "user_id_malformed",
    b'{"type": "user.deleted", "data": {"id": null}}': "user_id_malformed",
    b'{"type": "user.deleted", "data": {"id": "user_1\\n"}}': "user_id_malformed",
    b'{"type": "user.created", "data": {"id": "org_1"}}': "user_id_malformed",
}


@pytest.mark.parametrize("body", BAD_EVENTS, ids=range(len(BAD_EVENTS)))
def test_answers_a_verified_message_that_is_not_an_event_with_400(
    service: Service, body: bytes
) -> None:
    """Nothing is written, and Svix retries."""
    response = service.deliver(body)
    assert (response.status_code, response.get_json()["reason"]) == (400, BAD_EVENTS[body])
    assert service.rows("SELECT count(*) FROM webhook_messages") == [(0,)]


def test_reads_no_more_than_a_mebibyte(service: Service) -> None:
    """A body of 1 MiB is processed; a body that is one byte larger gets a 413."""
    body = user_event(clerk_id("user"), public_metadata={"x": ""})
    padded = body.replace(b'"x":""', b'"x":"' + b"y" * (1024 * 1024 - len(body)) + b'"')
    assert service.outcome(padded) == "applied"
    response = service.http.post("/webhooks/clerk", data=padded + b" ")
    assert (response.status_code, response.get_json()["reason"]) == (413, "body_too_large")


def test_reads_chunked_bodies(service: Service) -> None:
    """The limit also applies without Content-Length; a body at the limit is read in full."""
    body = user_event(clerk_id("user"))
    padded = body + b" " * (1024 * 1024 - len(body))
    for extra, status in ((b"", 200), (b" ", 413), (b" " * 100_000, 413)):
        whole = padded + extra
        response = service.http.post(
            "/webhooks/clerk",
            input_stream=io.BytesIO(whole),
            headers=service.clerk.headers(whole),
            environ_overrides={"wsgi.input_terminated": True},
        )
        assert response.status_code == status


def test_accepts_every_secret_while_rotating(make_service: MakeService, clerk: FakeClerk) -> None:
    """Messages signed with any configured secret are accepted; others are refused."""
    old, new = FakeClerk(private_key=clerk.private_key), FakeClerk(private_key=clerk.private_key)
    secrets = ",".join(one.environ["CLERK_WEBHOOK_SECRET"] for one in (old, new))
    service = make_service(CLERK_WEBHOOK_SECRET=secrets)
    body = user_event(clerk_id("user"))
    answers = [
        service.http.post("/webhooks/clerk", data=body, headers=one.headers(body))
        for one in (old, new, clerk)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401]


HEADER_NAMES = st.sampled_from(
    [
        "svix-id",
        "svix-timestamp",
        "svix-signature",
        "webhook-id",
        "content-type",
        "content-encoding",
    ]
)
HEADER_VALUES = st.text(
    st.characters(max_codepoint=255, exclude_characters="\r\n\x00"), max_size=50
)


@given(headers=st.dictionaries(HEADER_NAMES, HEADER_VALUES), body=st.binary(max_size=200))
def test_never_answers_a_stranger_with_a_5xx(
    unreachable: Service, headers: dict[str, str], body: bytes
) -> None:
    """Hostile headers and bodies get a 401, without a database query."""
    response = unreachable.http.post("/webhooks/clerk", data=body, headers=headers)
    assert response.status_code == 401


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda leaf: st.lists(leaf) | st.dictionaries(st.text(), leaf),
)
FIELDS = (
    "first_name",
    "last_name",
    "username",
    "image_url",
    "email_addresses",
    "primary_email_address_id",
    "updated_at",
    "unheard_of",
)


@given(data=st.dictionaries(st.sampled_from(FIELDS), JSON), timestamp=JSON)
def test_accepts_a_user_with_any_optional_fields(
    service: Service, data: dict[str, object], timestamp: object
) -> None:
    """A user event with a valid user id is accepted, even if other fields are malformed."""
    envelope = {
        "type": "user.updated",
        "timestamp": timestamp,
        "data": data | {"id": clerk_id("user")},
    }
    assert service.deliver(json.dumps(envelope).encode()).status_code == 200
