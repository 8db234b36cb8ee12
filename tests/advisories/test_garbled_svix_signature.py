"""
Garbage beside a good signature in one header, as when a secret is rotated.

It bites every receiver on svix's own ``verify()``: its base64 fails on the garbage, and the request ends in a 500.
"""

from __future__ import annotations

import pytest

from clerkhooks.cli.pretend import clerk_id
from tests.support import Service, user_event


@pytest.mark.parametrize("garbage", ["v1,!", "v1,A", "v1,é", "v1", ",", "v2,x", "v1,", "v1a,AAAA", "," * 99, "v1,AA==AA"])
@pytest.mark.parametrize("template", ["{garbage} {good}", "{good} {garbage}"])
def test_finds_the_good_signature_beside_garbage(service: Service, garbage: str, template: str) -> None:
    """One good one is enough, and garbage alone is a 401."""
    body = user_event(clerk_id("user"))
    headers = service.clerk.headers(body)
    both = headers | {"svix-signature": template.format(garbage=garbage, good=headers["svix-signature"])}
    alone = service.http.post("/webhooks/clerk", data=body, headers=headers | {"svix-signature": garbage})
    assert (alone.status_code, alone.get_json()["reason"]) == (401, "signature_mismatch")
    taken = service.http.post("/webhooks/clerk", data=body, headers=both)
    assert (taken.status_code, taken.get_json()["outcome"]) == (200, "applied")
