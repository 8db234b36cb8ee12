"""Failovers from a primary to its synchronous standby, behind one address."""

from __future__ import annotations

from pathlib import Path

import pytest

from clerkhooks.clerk.fake import FakeClerk
from tests.conftest import migrate
from tests.racing import eventually
from tests.replication import Sender, cluster, fail_over, lost
from tests.server import serving

pytestmark = pytest.mark.slow


def test_loses_no_message_and_recovers_without_a_restart(clerk: FakeClerk, tmp_path: Path) -> None:
    """
    No acknowledged message is lost in a crash or a demotion.

    A demotion leaves sessions open but read-only. ``/readyz`` returns 503 during the failover, and
    200 within 5 s of the promotion. After that, no delivery attempt fails.
    """
    with cluster() as nodes:
        migrate(nodes.url, clerk)
        with serving(nodes.url, clerk, tmp_path / "server.log") as server:
            sender = Sender(server)
            results = [fail_over(nodes, server, crash=crash) for crash in (True, False)]
            failed_before = sender.failed
            acknowledged_before = len(sender.acknowledged)
            later = Sender(server)
            eventually(lambda: len(later.acknowledged) >= 100 or later.failed)
            for each in (sender, later):
                each.stop()
            assert (sender.failed, later.failed) == (failed_before, 0)
            assert len(sender.acknowledged) > acknowledged_before > 0
            assert lost(server, sender.acknowledged | later.acknowledged) == []
    assert [was_unready for _, was_unready in results] == [True, True]
    assert max(seconds for seconds, _ in results) < 5
