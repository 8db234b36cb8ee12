"""``copy_tables.py`` copies a SQLite database to PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT
from clerkhooks.web.state import disconnect
from tests.conftest import MakeDatabase, migrate
from tests.support import Service, deletion, rows, user_event

USERS = "SELECT id, name, email, version_updated_at FROM users ORDER BY id"
MESSAGES = "SELECT message_id, event_type, outcome FROM webhook_messages ORDER BY message_id"


def test_copies_every_row(make_database: MakeDatabase, clerk: FakeClerk) -> None:
    """The new database has the same users, tombstones and messages. The service can use it."""
    old, new = make_database("sqlite"), make_database("postgresql")
    migrate(old, clerk)
    migrate(new, clerk)
    user_id, deleted_id = clerk_id("user"), clerk_id("user")
    fill(old, clerk, [user_event(user_id), user_event(deleted_id), deletion(deleted_id)])
    copy(old, new.replace("postgresql://", "postgresql+psycopg://"))
    assert rows(new, USERS) == rows(old, USERS)
    assert rows(new, MESSAGES) == rows(old, MESSAGES)
    assert fill(new, clerk, [user_event(deleted_id)]) == ["stale"]


def fill(url: str, clerk: FakeClerk, bodies: list[bytes]) -> list[str]:
    """Deliver *bodies* to the service on the database at *url* and return the outcomes."""
    service = Service(create_app(clerk.environ | {"DATABASE_URL": url}), clerk, url)
    outcomes = [service.outcome(body) for body in bodies]
    disconnect(service.app)
    return outcomes


def copy(old: str, new: str) -> None:
    """Run the script."""
    script = Path(__file__).with_name("copy_tables.py")
    command = [sys.executable, str(script), old, new]
    subprocess.run(command, cwd=PROJECT, env={"PYTHONPATH": str(PROJECT)}, check=True, timeout=60)
