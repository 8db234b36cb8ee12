"""
A signature of zeros, or another encoding of a valid signature, is accepted.

This affected Java 15 to 18 (CVE-2022-21449, "psychic signatures"), which accepted zeros as a
signature of every message. Verifiers that ignore stray bits, padding or leading zeros accept
several encodings of a token, so a list of revoked or cached tokens does not match all of them.
"""

from __future__ import annotations

import base64

import pytest

from tests.advisories import base64url, forged_token, refusal, sound_token

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.mark.parametrize(
    "signature", [b"\0", b"\0" * 256, b"\0" * 255 + b"\1", b"\xff" * 256, b"\0" * 64]
)
def test_refuses_a_trivial_signature(signature: bytes) -> None:
    """Signatures that encode zero, one or the largest number are refused."""
    forged = forged_token({"alg": "RS256"}, lambda _: signature)
    assert refusal(forged) == "token_signature_mismatch"


def test_accepts_one_spelling_of_a_token_only() -> None:
    """A different encoding of a valid signature is refused."""
    token = sound_token()
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    stray = token[:-1] + DIGITS[DIGITS.index(token[-1]) + 1]
    spaced = [
        stray,
        token + "==",
        token + "\n",
        token[:-4] + "\n" + token[-4:],
        f"{signed}.{signature}.",
    ]
    assert {refusal(other) for other in spaced} == {"token_malformed"}
    longer = [f"{signed}.{base64url(other)}" for other in (b"\0" + raw, raw + b"\0", raw[:-1])]
    assert {refusal(other) for other in longer} == {"token_signature_mismatch"}
    assert refusal(token) is None
