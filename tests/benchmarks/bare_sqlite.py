"""A webhook's statements in sqlite3 alone, with the service's durability."""

from __future__ import annotations

import sqlite3
from pathlib import Path

NOW = "2026-01-31 08:00:00.000000"
USER = f"INSERT INTO users VALUES ({', '.join('?' * 12)}) ON CONFLICT (id) DO UPDATE SET name = excluded.name"
MESSAGE = f"INSERT INTO webhook_messages VALUES ({', '.join('?' * 9)}) ON CONFLICT DO NOTHING"


def connect(file: Path) -> sqlite3.Connection:
    """A connection that waits for the disk at each commit."""
    connection = sqlite3.connect(file, isolation_level="IMMEDIATE")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def write_message(connection: sqlite3.Connection, user_id: str, message_id: str) -> None:
    """A user and a message in one transaction."""
    profile = ("ada@example.org", "Ada L", "https://img.clerk.com/x")
    connection.execute(USER, (user_id, *profile, False, NOW, NOW, NOW, None, 1, 1, message_id))
    connection.execute(MESSAGE, (message_id, "user.updated", user_id, "applied", 1, NOW, NOW, NOW, None))
    connection.commit()
