"""
A machine-to-machine (M2M) token is presented as a user's session token.

This affects verifiers that check only the signature, because Clerk signs both kinds of token with
the same key (RFC 8725, 2.8).
"""

from __future__ import annotations

from typing import Any

from clerkhooks.clerk.fake import clerk_id
from tests.advisories import CLERK, refusal

MACHINE: dict[str, Any] = {
    "sid": None,
    "azp": None,
    "sts": None,
    "jti": clerk_id("mt"),
    "scopes": clerk_id("mch"),
}


def test_refuses_a_machine_token() -> None:
    """A machine token is refused, even if its header has the category of a session token."""
    category = {"cat": "cl_B7d4PD333AAA"}
    marked = CLERK.session_token(clerk_id("mch"), header=category, **MACHINE)
    assert refusal(marked) == "token_category_mismatch"
    assert refusal(CLERK.session_token(clerk_id("mch"), **MACHINE)) == "token_subject_malformed"
    assert refusal(CLERK.session_token(clerk_id("mch"))) == "token_subject_malformed"
