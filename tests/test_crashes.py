"""Crashes: a short run of what ``python -m tests.crashes`` does for as long as one likes."""

from __future__ import annotations

import pytest

from tests.conftest import KINDS
from tests.crashes import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_loses_nothing_whoever_is_killed(kind: str) -> None:
    """Workers, server and database are killed at random moments: in the end every user is what the events say."""
    report = run(kind, seconds=6, seed=1)
    assert report.lost == 0
    assert report.messages > 0
    assert report.crashes.total() >= 3
    if (
        kind == "sqlite"
    ):  # it cannot go away, so there is nothing that an answer of 500 would be for
        assert report.attempts["500"] == report.calls["500"] == 0
