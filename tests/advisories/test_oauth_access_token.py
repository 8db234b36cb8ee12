"""
An OAuth access token, which a third party holds for a user, shown as that user's session.

It bites resource servers that ignore ``typ``: the third party may then do all that the user may (RFC 9068, 5).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.advisories import refusal, sound_token

GRANT: dict[str, Any] = {"sid": None, "azp": None, "client_id": "client_1", "scope": "profile"}


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt"])
def test_takes_no_oauth_access_token_for_a_session(typ: str) -> None:
    """Its type refuses it, also where it has all claims of a session."""
    assert refusal(sound_token(header={"typ": typ}, **GRANT)) == "token_type_mismatch"
    assert refusal(sound_token(header={"typ": typ})) == "token_type_mismatch"
