"""
A token from a JWT template, meant for another service, is used as a session token.

This affects applications that use Clerk's SDKs, which accept such a token. It may be valid for
years, and signing out does not invalidate it.
"""

from __future__ import annotations

from tests.advisories import refusal, sound_token


def test_refuses_a_template_token() -> None:
    """A template token is refused because of its category or because it has no session id."""
    marked = sound_token(header={"cat": "cl_B7d4PD222AAA"}, sid=None, sts=None, v=None)
    assert refusal(marked) == "token_category_mismatch"
    assert refusal(sound_token(sid=None, sts=None, v=None)) == "token_session_missing"
