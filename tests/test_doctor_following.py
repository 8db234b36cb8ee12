"""The doctor's findings about the follower and about missed webhooks."""

from __future__ import annotations

import pytest

from clerkhooks.doctor import APPLICATION, SERVICE, Program
from clerkhooks.doctor.database import judge_database
from clerkhooks.sync.progress import Deletions
from tests.backend import Backend
from tests.conftest import MakeService
from tests.following import complete_round
from tests.support import NOW_MS, Service


def findings(service: Service) -> dict[str, str]:
    """Return the levels of the findings about the follower, by code."""
    state = service.app.extensions["clerkhooks"]
    found = judge_database(state.store, state.settings)
    return {
        each.code: each.level for each in found if each.code.startswith(("follower", "deliveries"))
    }


def test_reports_the_follower(make_service: MakeService, backend: Backend) -> None:
    """A follower that has never run, has stopped, or has failed is reported with a remedy."""
    service = make_service(**backend.environ)
    assert findings(service) == {"follower_never_ran": "warning"}
    complete_round(service, completed=False)
    assert findings(service)["follower_begins"] == "ok"
    complete_round(service)
    assert findings(service) == {"follower_runs": "ok", "deliveries_complete": "ok"}
    for fault in ("wrong_instance", "secret_key_refused"):
        complete_round(service, completed=False, error=fault)
        assert findings(service)[f"follower_{fault}"] == "error"
    complete_round(service, deletions={"user": Deletions(withheld=True)})
    assert findings(service)["follower_deletions_withheld"] == "error"
    complete_round(service)
    service.rows("UPDATE clerk_leases SET completed_at = completed_at - 600000")
    assert findings(service)["follower_stopped"] == "error"
    assert findings(make_service(**backend.environ, CLERK_FOLLOW="0")) == {}
    assert findings(make_service()) == {}


@pytest.mark.parametrize(
    ("program", "remedy"),
    [
        (SERVICE, "Start the service with gunicorn, or run: clerkhooks sync --follow"),
        (APPLICATION, "Run: flask clerk sync --follow"),
    ],
)
def test_says_how_to_start_a_follower(
    make_service: MakeService, backend: Backend, program: Program, remedy: str
) -> None:
    """In an application, no worker follows, so the remedy names only the command."""
    state = make_service(**backend.environ).app.extensions["clerkhooks"]
    found = judge_database(state.store, state.settings, program)
    assert [each.remedy for each in found if each.code == "follower_never_ran"] == [remedy]


def test_reports_missed_webhooks(make_service: MakeService, backend: Backend) -> None:
    """The finding contains the number of changes, the times, and what to check."""
    service = make_service(**backend.environ)
    complete_round(service)
    for number in (1, 2):
        values = f"'user_{number}', {1_700_000_000_000 + number * 60_000}, false"
        due_at = NOW_MS - 1000
        service.rows(f"INSERT INTO clerk_awaited_webhooks VALUES ({values}, {due_at})")
    state = service.app.extensions["clerkhooks"]
    found = judge_database(state.store, state.settings)
    [finding] = [each for each in found if each.code == "deliveries_missed"]
    assert "for 2 changes at Clerk, the first at 2023-11-14 22:14 and the last" in finding.what
    assert "Clerk Dashboard → Webhooks" in str(finding.remedy)
    assert finding.level == "error"
