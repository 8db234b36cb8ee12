"""
A token made from a JWT template, for another service, is presented as a session.

Affects users of Clerk's SDKs, which accept it: it may last for years, and no sign-out ends it.
"""

from __future__ import annotations

from tests.advisories import refusal, sound_token


def test_refuses_a_template_token() -> None:
    """A template token has a separate category; even without a category, it has no session id."""
    marked = sound_token(header={"cat": "cl_B7d4PD222AAA"}, sid=None, sts=None, v=None)
    assert refusal(marked) == "token_category_mismatch"
    assert refusal(sound_token(sid=None, sts=None, v=None)) == "token_session_missing"
