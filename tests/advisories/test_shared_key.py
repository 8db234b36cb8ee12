"""
One key, several instances: satellite domains, a copied development instance, a proxy in front of several.

Clerk's own ``authenticateRequest`` compares no issuer, so that a user of the one is let into the other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.advisories import CLERK, refusal, sound_token

NEIGHBOUR = replace(CLERK, frontend_api="clerk.example.net")


def test_takes_no_token_of_a_neighbour_with_the_same_key() -> None:
    """The signature holds, the issuer does not."""
    assert refusal(sound_token(NEIGHBOUR)) == "token_issuer_mismatch"


@pytest.mark.parametrize("iss", [None, "", "https://clerk.example.com/", "https://clerk.example.com.evil.example", "clerk.example.com"])
def test_takes_nothing_that_merely_resembles_our_issuer(iss: object) -> None:
    """It is compared whole."""
    assert refusal(sound_token(iss=iss)) == "token_issuer_mismatch"
