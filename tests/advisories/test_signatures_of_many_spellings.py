"""
Empty numbers for a signature, and many texts for one.

It bit Java 15 to 18 (CVE-2022-21449, "psychic signatures"), where zeros held for every message; and every list of
revoked or remembered tokens whose verifier drops stray bits, takes padding or a signature with a zero in front.
"""

from __future__ import annotations

import base64

import pytest

from tests.advisories import base64url, forged_token, refusal, sound_token

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.mark.parametrize("signature", [b"\0", b"\0" * 256, b"\0" * 255 + b"\1", b"\xff" * 256, b"\0" * 64])
def test_takes_no_signature_of_nothing(signature: bytes) -> None:
    """Zero, one and the greatest number are signatures of no message."""
    assert refusal(forged_token({"alg": "RS256"}, lambda _: signature)) == "token_signature_mismatch"


def test_takes_one_spelling_of_a_token_only() -> None:
    """Nothing that stands for the same bytes, or for the same number, passes beside it."""
    token = sound_token()
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    stray = token[:-1] + DIGITS[DIGITS.index(token[-1]) + 1]
    spaced = [stray, token + "==", token + "\n", token[:-4] + "\n" + token[-4:], f"{signed}.{signature}."]
    assert {refusal(other) for other in spaced} == {"token_malformed"}
    longer = [f"{signed}.{base64url(other)}" for other in (b"\0" + raw, raw + b"\0", raw[:-1])]
    assert {refusal(other) for other in longer} == {"token_signature_mismatch"}
    assert refusal(token) is None
