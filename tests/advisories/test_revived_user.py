"""
A late update restores a deleted user.

This affects every receiver that upserts without comparing versions: Svix retries for a day and does
not guarantee ordering, so the erased profile reappears.
"""

from __future__ import annotations

import pytest

from clerkhooks.clerk.fake import clerk_id
from tests.support import NOW_MS, Service, deletion, user_event


@pytest.mark.parametrize("event_type", ["user.created", "user.updated"])
@pytest.mark.parametrize("late", [-1, 0, 60_000])
def test_keeps_a_deleted_user_deleted(service: Service, event_type: str, late: int) -> None:
    """No event, whether older or newer, and no unexpired token can undo the deletion."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    assert service.outcome(deletion(user_id)) == "applied"
    assert service.outcome(user_event(user_id, event_type, at=NOW_MS + late)) == "stale"
    assert service.user(user_id) == (None, "Deleted User", None)
    response = service.call(user_id)
    assert (response.status_code, response.get_json()["reason"]) == (401, "user_deleted")
