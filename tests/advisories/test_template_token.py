"""
A token that was made from a JWT template, for somebody else's service, shown as a session.

It bites users of Clerk's SDKs, which take it: it may last for years, and no sign-out ends it.
"""

from __future__ import annotations

from tests.advisories import refusal, sound_token


def test_takes_no_template_token_for_a_session() -> None:
    """It has a category of its own, and where that is missing, no session id."""
    assert refusal(sound_token(header={"cat": "cl_B7d4PD222AAA"}, sid=None, sts=None, v=None)) == "token_category_mismatch"
    assert refusal(sound_token(sid=None, sts=None, v=None)) == "token_session_missing"
