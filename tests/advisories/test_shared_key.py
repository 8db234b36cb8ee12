"""
Several instances share one key, for example an instance and its copy.

Clerk's own ``authenticateRequest`` does not compare the issuer, so a user of one instance is
accepted by the others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.advisories import CLERK, refusal, sound_token

NEIGHBOUR = replace(CLERK, frontend_api="clerk.example.net")


def test_refuses_a_token_of_another_instance_with_the_same_key() -> None:
    """A token from another issuer is refused, even if the signature is valid."""
    assert refusal(sound_token(NEIGHBOUR)) == "token_issuer_mismatch"


@pytest.mark.parametrize(
    "iss",
    [
        None,
        "",
        "https://clerk.example.com/",
        "https://clerk.example.com.evil.example",
        "clerk.example.com",
    ],
)
def test_refuses_an_issuer_that_only_resembles_its_own(iss: object) -> None:
    """The issuer is compared as a whole, not by prefix."""
    assert refusal(sound_token(iss=iss)) == "token_issuer_mismatch"
