"""
An attacker uses an unverified or reassigned email address to take over an account.

This affected "Sign in with Microsoft" in 2023 ("nOAuth"). It affects every application that
identifies users by email address.
"""

from __future__ import annotations

from clerkhooks.clerk.fake import clerk_id
from tests.support import Service, user_event


def test_matches_users_by_id_alone(service: Service) -> None:
    """Webhooks and tokens never merge two users with the same email address and username."""
    victim, attacker = clerk_id("user"), clerk_id("user")
    service.outcome(user_event(victim, first_name="Victim", username="ada"))
    service.outcome(user_event(attacker, first_name="Attacker", username="ada"))
    assert [service.user(user_id, ("email", "name")) for user_id in (victim, attacker)] == [
        ("ada@example.org", "Victim Lovelace"),
        ("ada@example.org", "Attacker Lovelace"),
    ]
    shown = service.call(attacker, email="ada@example.org", username="ada").get_json()
    assert (shown["id"], shown["name"]) == (attacker, "Attacker Lovelace")


def test_ignores_an_email_address_in_the_token(service: Service) -> None:
    """The first call by an unknown user creates a new row, regardless of the token's claims."""
    victim, stranger = clerk_id("user"), clerk_id("user")
    service.outcome(user_event(victim))
    shown = service.call(stranger, email="ada@example.org").get_json()
    assert (shown["id"], shown["email"], shown["name"]) == (stranger, None, "New User")
