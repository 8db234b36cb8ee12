"""
A machine's token (M2M) shown where a user's session is expected.

It bites whoever verifies the signature only: Clerk signs both with the instance's one key (RFC 8725, 2.8).
"""

from __future__ import annotations

from typing import Any

from clerkhooks.cli.pretend import clerk_id
from tests.advisories import CLERK, refusal

MACHINE: dict[str, Any] = {"sid": None, "azp": None, "sts": None, "jti": clerk_id("mt"), "scopes": clerk_id("mch")}


def test_takes_no_machine_token_for_a_session() -> None:
    """A machine is nobody's user, with its own category or without any."""
    category = {"cat": "cl_B7d4PD333AAA"}
    assert refusal(CLERK.session_token(clerk_id("mch"), header=category, **MACHINE)) == "token_category_mismatch"
    assert refusal(CLERK.session_token(clerk_id("mch"), **MACHINE)) == "token_subject_malformed"
    assert refusal(CLERK.session_token(clerk_id("mch"))) == "token_subject_malformed"
