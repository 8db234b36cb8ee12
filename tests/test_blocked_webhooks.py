"""A short run without webhooks; ``python -m tests.blocked_webhooks`` runs it for longer."""

from __future__ import annotations

import pytest

from tests.blocked_webhooks import run
from tests.conftest import KINDS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_stores_every_change(kind: str) -> None:
    """The process that follows is killed at random. Every change is stored soon."""
    report = run(kind, seconds=20, seed=1, kills=(4, 8), interval=1)
    assert report.longest < 20
    assert report.kills >= 2
    assert {*report.delays} >= {"user", "org", "orgmem"}
