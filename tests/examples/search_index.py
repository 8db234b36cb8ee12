"""
Keep a search index of all users, in another process, with the change feed.

    python search_index.py https://users.example.com DATABASE_URL index.db

CHANGES_TOKEN contains the token of the feed. DATABASE_URL is a SQLAlchemy URL of the service's
database; the script needs only the privilege SELECT on users. The index is a SQLite file. The
cursor is stored in it, in the same transaction as the users, so a killed process continues where it
was.
"""

import os
import sqlite3
import sys
from contextlib import closing
from typing import Any

import httpx
import sqlalchemy as sa

TABLES = """
CREATE VIRTUAL TABLE IF NOT EXISTS users USING fts5(id UNINDEXED, name, email);
CREATE TABLE IF NOT EXISTS position (cursor TEXT NOT NULL);
"""
USERS = "SELECT id, name, email FROM users WHERE deleted_at IS NULL"


class SearchIndex:
    """The index in the file *index*, of users in *database*. *feed* is a client of the service."""

    def __init__(self, index: sqlite3.Connection, database: sa.Engine, feed: httpx.Client) -> None:
        self._index, self._database, self._feed = index, database, feed
        self._index.executescript(TABLES)

    def follow(self) -> None:
        """Apply changes for ever."""
        while True:
            self.update()

    def update(self) -> None:
        """Apply the next changes, or wait for a while until there is one."""
        found = self._index.execute("SELECT cursor FROM position").fetchone()
        if found is None:
            self._copy_all()
            return
        response = self._feed.get("/changes", params={"after": found[0], "limit": 500, "wait": 10})
        if response.status_code == 410:  # changes after the cursor were pruned
            self._copy_all()
            return
        answer = response.raise_for_status().json()
        changed = {each["objectId"] for each in answer["changes"] if each["objectType"] == "user"}
        ids = sa.bindparam("ids", list(changed), type_=sa.Text, expanding=True)
        users = self._read(sa.text(f"{USERS} AND id IN :ids").bindparams(ids))
        self._write(changed, users, answer["next"])

    def _copy_all(self) -> None:
        """Copy all users. The cursor is read before them, so no change is missed."""
        response = self._feed.get("/changes", params={"after": "end"})
        cursor = response.raise_for_status().json()["next"]
        users = self._read(sa.text(USERS))
        known = {row[0] for row in self._index.execute("SELECT id FROM users")}
        self._write(known.union(row[0] for row in users), users, cursor)

    def _read(self, query: sa.TextClause) -> list[tuple[Any, ...]]:
        with self._database.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def _write(self, changed: set[str], users: list[tuple[Any, ...]], cursor: str) -> None:
        """Replace the *changed* users by those that still exist, and store the cursor."""
        with self._index:  # one transaction
            self._index.executemany("DELETE FROM users WHERE id = ?", [(one,) for one in changed])
            self._index.executemany("INSERT INTO users VALUES (?, ?, ?)", users)
            self._index.execute("DELETE FROM position")
            self._index.execute("INSERT INTO position VALUES (?)", (cursor,))


def main(url: str, database_url: str, path: str) -> None:
    """Follow the feed until the process is killed."""
    headers = {"Authorization": f"Bearer {os.environ['CHANGES_TOKEN']}"}
    with (
        closing(sqlite3.connect(path)) as index,
        httpx.Client(base_url=url, headers=headers, timeout=30) as feed,
    ):
        SearchIndex(index, sa.create_engine(database_url), feed).follow()


if __name__ == "__main__":
    main(*sys.argv[1:])
