"""
A header contains a garbled signature and a valid one, as during secret rotation.

This affects receivers that use svix's own ``verify()``: its base64 decoder raises an error, and the
response is a 500.
"""

from __future__ import annotations

import pytest
from werkzeug.test import TestResponse

from clerkhooks.clerk.fake import clerk_id
from tests.support import Service, user_event


def post(service: Service, body: bytes, headers: dict[str, str]) -> TestResponse:
    """Post a delivery with these headers."""
    return service.http.post("/webhooks/clerk", data=body, headers=headers)


@pytest.mark.parametrize(
    "garbage", ["v1,!", "v1,A", "v1,é", "v1", ",", "v2,x", "v1,", "v1a,AAAA", "," * 99, "v1,AA==AA"]
)
@pytest.mark.parametrize("template", ["{garbage} {good}", "{good} {garbage}"])
def test_finds_a_good_signature_beside_a_garbled_one(
    service: Service, garbage: str, template: str
) -> None:
    """One valid signature is enough, and a garbled signature alone is refused with 401."""
    body = user_event(clerk_id("user"))
    headers = service.clerk.headers(body)
    both = template.format(garbage=garbage, good=headers["svix-signature"])
    alone = post(service, body, headers | {"svix-signature": garbage})
    assert (alone.status_code, alone.get_json()["reason"]) == (401, "signature_mismatch")
    accepted = post(service, body, headers | {"svix-signature": both})
    assert (accepted.status_code, accepted.get_json()["outcome"]) == (200, "applied")
