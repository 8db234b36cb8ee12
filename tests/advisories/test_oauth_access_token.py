"""
A third party presents its OAuth access token for a user as that user's session.

Affects resource servers that ignore ``typ``: the third party can then do everything that the user
can (RFC 9068, 5).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.advisories import refusal, sound_token

GRANT: dict[str, Any] = {"sid": None, "azp": None, "client_id": "client_1", "scope": "profile"}


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt"])
def test_refuses_an_oauth_access_token(typ: str) -> None:
    """An OAuth token is refused for its type, even if it has all claims of a session."""
    assert refusal(sound_token(header={"typ": typ}, **GRANT)) == "token_type_mismatch"
    assert refusal(sound_token(header={"typ": typ})) == "token_type_mismatch"
