"""POST /webhooks/clerk, as Svix meets it."""

from __future__ import annotations

from clerkhooks.cli.pretend import clerk_id
from tests.support import Service, user_event


def test_creates_a_user(service: Service) -> None:
    """A sign-up in Clerk becomes a row."""
    user_id = clerk_id("user")
    assert service.outcome(user_event(user_id, "user.created")) == "applied"
    assert service.user(user_id) == ("ada@example.org", "Ada Lovelace", f"https://img.clerk.com/{user_id}")
