"""
A token's header declares that the token is not signed.

This affected the jsonwebtoken package (CVE-2015-9235) and many others. Some of them refused "none"
but accepted "nOnE".
"""

from __future__ import annotations

import pytest

from tests.advisories import forged_token, refusal


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", "NONE", "", None, ["RS256"]])
def test_refuses_a_token_without_a_signature(alg: object) -> None:
    """Every spelling of "none" is refused, whether or not the token has a signature part."""
    assert refusal(forged_token({"alg": alg}, lambda _: b"anything")) == "token_algorithm_refused"
    assert refusal(forged_token({"alg": alg}, lambda _: b"")) == "token_malformed"
