"""
A third party presents a user's OAuth access token as that user's session token.

This affects resource servers that ignore ``typ``: the third party can then do everything that the
user can do (RFC 9068, 5).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.advisories import refusal, sound_token

GRANT: dict[str, Any] = {"sid": None, "azp": None, "client_id": "client_1", "scope": "profile"}


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt"])
def test_refuses_an_oauth_access_token(typ: str) -> None:
    """An OAuth token is refused because of its type, even with all claims of a session token."""
    assert refusal(sound_token(header={"typ": typ}, **GRANT)) == "token_type_mismatch"
    assert refusal(sound_token(header={"typ": typ})) == "token_type_mismatch"
