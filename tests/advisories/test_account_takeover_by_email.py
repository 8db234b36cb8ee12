"""
An attacker takes over an account by an email address, reassigned or never verified.

Exploited in "Sign in with Microsoft" in 2023 ("nOAuth"). It affects every table that matches users
by email.
"""

from __future__ import annotations

from clerkhooks.clerk.fake import clerk_id
from tests.support import Service, user_event


def test_matches_users_by_id_alone(service: Service) -> None:
    """Two users with the same address and username stay two, for webhooks and for tokens."""
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
    """The first call of an unknown user creates a new row, regardless of its claims."""
    victim, stranger = clerk_id("user"), clerk_id("user")
    service.outcome(user_event(victim))
    shown = service.call(stranger, email="ada@example.org").get_json()
    assert (shown["id"], shown["email"], shown["name"]) == (stranger, None, "New User")
