"""
A token that says of itself that it needs no signature.

It bit the jsonwebtoken package (CVE-2015-9235) and many after it, some of which refused "none" and took "nOnE".
"""

from __future__ import annotations

import pytest

from tests.advisories import forged_token, refusal


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", "NONE", "", None, ["RS256"]])
def test_takes_no_token_that_waives_its_signature(alg: object) -> None:
    """However it is spelt, with something in the signature's place or nothing."""
    assert refusal(forged_token({"alg": alg}, lambda _: b"anything")) == "token_algorithm_refused"
    assert refusal(forged_token({"alg": alg}, lambda _: b"")) == "token_malformed"
