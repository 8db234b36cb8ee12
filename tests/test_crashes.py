"""A short run of the crash test; ``python -m tests.crashes`` runs it for longer."""

from __future__ import annotations

import pytest

from tests.conftest import KINDS
from tests.crashes import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_loses_no_message_in_crashes(kind: str) -> None:
    """Workers, the server and the database are killed at random. All rows end up correct."""
    report = run(kind, seconds=6, seed=1)
    assert report.lost == 0
    assert report.messages > 0
    assert report.crashes.total() >= 3
    if kind == "sqlite":  # a SQLite file is always available, so no delivery may fail
        assert report.attempts["500"] == report.calls["500"] == 0
