"""
Somebody else's account, had by an address that was once theirs or that nobody verified.

It bit "Sign in with Microsoft" in 2023 ("nOAuth") and every table that finds its users by email.
"""

from __future__ import annotations

from clerkhooks.cli.pretend import clerk_id
from tests.support import Service, user_event


def test_matches_users_by_their_id_alone(service: Service) -> None:
    """Two users with one address and one username stay two, in the table and behind their tokens."""
    victim, attacker = clerk_id("user"), clerk_id("user")
    service.outcome(user_event(victim, first_name="Victim", username="ada"))
    service.outcome(user_event(attacker, first_name="Attacker", username="ada"))
    assert [service.user(user_id, ("email", "name")) for user_id in (victim, attacker)] == [
        ("ada@example.org", "Victim Lovelace"),
        ("ada@example.org", "Attacker Lovelace"),
    ]
    shown = service.call(attacker, email="ada@example.org", username="ada").get_json()
    assert (shown["id"], shown["name"]) == (attacker, "Attacker Lovelace")


def test_gives_a_stranger_no_row_for_an_address_in_the_token(service: Service) -> None:
    """The first call of an unknown user makes a row of its own, whatever its claims say."""
    victim, stranger = clerk_id("user"), clerk_id("user")
    service.outcome(user_event(victim))
    shown = service.call(stranger, email="ada@example.org").get_json()
    assert (shown["id"], shown["email"], shown["name"]) == (stranger, None, "New User")
