"""
A token's header says that it needs no signature.

Affected the jsonwebtoken package (CVE-2015-9235) and many after it, some of which refused "none"
and accepted "nOnE".
"""

from __future__ import annotations

import pytest

from tests.advisories import forged_token, refusal


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", "NONE", "", None, ["RS256"]])
def test_refuses_a_token_without_a_signature(alg: object) -> None:
    """Every spelling of "none" is refused, with or without text in place of the signature."""
    assert refusal(forged_token({"alg": alg}, lambda _: b"anything")) == "token_algorithm_refused"
    assert refusal(forged_token({"alg": alg}, lambda _: b"")) == "token_malformed"
