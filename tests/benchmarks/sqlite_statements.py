"""A webhook's statements in plain sqlite3, with the same durability as the service."""

from __future__ import annotations

import sqlite3
from pathlib import Path

NOW = "2026-01-31 08:00:00.000000"
USER = """
INSERT INTO users (id, email, name, image_url, is_online, last_seen, created_at, updated_at,
    version_updated_at, version_timestamp, version_message_id)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET name = excluded.name
"""
MESSAGE = """
INSERT INTO webhook_messages (message_id, event_type, clerk_user_id, outcome, attempts, occurred_at,
    received_at, processed_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""


def connect(file: Path) -> sqlite3.Connection:
    """Open a connection that syncs every commit to disk."""
    connection = sqlite3.connect(file, isolation_level="IMMEDIATE")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def write_message(connection: sqlite3.Connection, user_id: str, message_id: str) -> None:
    """Write a user and a message in one transaction."""
    profile = ("ada@example.org", "Ada L", "https://img.clerk.com/x")
    connection.execute(USER, (user_id, *profile, False, NOW, NOW, NOW, 1, 1, message_id))
    message = (message_id, "user.updated", user_id, "applied", 1, NOW, NOW, NOW)
    connection.execute(MESSAGE, message)
    connection.commit()
