"""The service with two handlers, one inside each message's transaction and one after it."""

from __future__ import annotations

from clerkhooks import Event, create_app
from clerkhooks.service import hooks

SEEN = {"inside": 0, "after": 0}


@hooks.on("user.*")
def count_inside(_event: Event) -> None:
    """Count a message in its transaction."""
    SEEN["inside"] += 1


@hooks.on("user.*", after_commit=True)
def count_after(_event: Event) -> None:
    """Count a message after its commit."""
    SEEN["after"] += 1


app = create_app()
