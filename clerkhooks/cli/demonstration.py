"""The demonstration of ``clerkhooks dev``: signed requests and their expected responses."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import click
from flask import Flask
from werkzeug.test import TestResponse

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.clerk.fake_events import FakeObjects
from clerkhooks.cli.options import mark, print_table

Message = tuple[dict[str, str], bytes]  # Svix's headers and the signed body
_QUERY = "SELECT id, name, email, date(deleted_at) FROM users ORDER BY created_at"


class Demonstration:
    """Sends the webhooks and API calls of three users to *app*. *clerk* signs them."""

    def __init__(self, app: Flask, clerk: FakeClerk) -> None:
        self._client, self._clerk = app.test_client(), clerk
        self.ada, self.grace, self.alan = (clerk_id("user") for _ in range(3))
        self._objects = FakeObjects()
        self._start = 0
        self._results: list[bool] = []

    def run(self, database: Path) -> bool:
        """Send the requests and check *database*. Return whether every check passed."""
        self._show_ordering()
        self._show_first_call()
        self._show_deletion()
        self._show_table(database)
        failed, total = self._results.count(False), len(self._results)
        text, colour = f"All {total} checks passed.", "green"
        if failed:
            text, colour = f"{failed} of {total} checks failed.", "red"
        click.secho(f"\n{mark(not failed)} {text}", fg=colour)
        return not failed

    def _show_ordering(self) -> None:
        self._begin("Ada signs up. Webhooks are repeated, late or forged; her row stays correct.")
        created = self._sign("user.created", self.ada, "Ada Byron")
        renamed = self._sign("user.updated", self.ada, "Ada Lovelace", 5)
        older = self._sign("user.updated", self.ada, "Ada King", 3)
        forged = (renamed[0], renamed[1].replace(b"Lovelace", b"Hacker"))
        self._send("user.created", created, "200 applied", "the row is inserted")
        self._send("user.updated", renamed, "200 applied", "the name changes")
        self._send("user.updated, repeated", renamed, "200 duplicate", "nothing changes")
        self._send("user.updated, older", older, "200 stale", "the newer name stays")
        self._send("user.updated, forged", forged, "401 signature_mismatch", "nothing changes")

    def _show_first_call(self) -> None:
        self._begin("Grace calls the API before her webhook arrives.")
        created = self._sign("user.created", self.grace, "Grace Hopper")
        self._call(self.grace, "200 New User", "the call inserts the row")
        self._send("user.created", created, "200 applied", "the webhook fills it in")
        self._call(self.grace, "200 Grace Hopper", "the API returns her name")

    def _show_deletion(self) -> None:
        self._begin("Alan deletes his account. The deletion is final.")
        created = self._sign("user.created", self.alan, "Alan Turing")
        deleted = self._sign("user.deleted", self.alan, "Alan Turing")
        updated = self._sign("user.updated", self.alan, "Al Turing", 5)
        self._send("user.created", created, "200 applied", "the row is inserted")
        self._send("user.deleted", deleted, "200 applied", "name, email and image are erased")
        self._send("user.updated, late", updated, "200 stale", "the user stays deleted")
        self._call(self.alan, "401 user_deleted", "his session token is refused")

    def _show_table(self, database: Path) -> None:
        with closing(sqlite3.connect(database)) as connection:
            rows = connection.execute(_QUERY).fetchall()
        expected = [
            (self.ada, "Ada Lovelace", "ada@example.org", False),
            (self.grace, "Grace Hopper", "grace@example.org", False),
            (self.alan, "Deleted User", None, True),
        ]
        found = [(*row[:3], row[3] is not None) for row in rows]
        _print_title("The users table contains the result.")
        label, meaning = "SELECT … FROM users", "two users and a tombstone"
        self._print_check(label, f"{len(rows)} rows", found == expected, meaning, meaning)
        print_table(("id", "name", "email", "deleted_at"), rows)

    def _begin(self, title: str) -> None:
        """Let a user sign up now: a few milliseconds before the first webhook is sent."""
        _print_title(title)
        self._start = int(time.time() * 1000) - 10

    def _sign(self, event_type: str, user_id: str, name: str, after: int = 0) -> Message:
        """Return a signed event about a user. *after* is in milliseconds since the sign-up."""
        first_name, last_name = name.split()
        profile = {"first_name": first_name, "last_name": last_name}
        email, at = f"{first_name.lower()}@example.org", self._start + after
        user = user_data(user_id, email=email, **profile, updated_at=at)
        self._objects.remember("user.updated", user)
        data = self._objects.event_data(event_type, user_id, clerk_id("org"), updated_at=at)
        body = event_body(event_type, data, at)
        return self._clerk.headers(body), body

    def _send(self, label: str, message: Message, expected: str, meaning: str) -> None:
        headers, body = message
        response = self._client.post("/webhooks/clerk", headers=headers, data=body)
        self._report(f"webhook {label}", response, expected, meaning)

    def _call(self, user_id: str, expected: str, meaning: str) -> None:
        headers = {"Authorization": f"Bearer {self._clerk.session_token(user_id)}"}
        response = self._client.get("/api/me", headers=headers)
        self._report("GET /api/me", response, expected, meaning)

    def _report(self, label: str, response: TestResponse, expected: str, meaning: str) -> None:
        """Compare *response* (the status, and the outcome, reason or name) with *expected*."""
        body = response.get_json()
        told = body.get("outcome") or body.get("reason") or body.get("name")
        answer = f"{response.status_code} {told}"
        self._print_check(label, answer, answer == expected, meaning, expected)

    def _print_check(self, label: str, answer: str, ok: bool, meaning: str, expected: str) -> None:
        self._results.append(ok)
        colour = "green" if ok else "red"
        sign = click.style(mark(ok), fg=colour)
        shown = click.style(f"{answer:<26}", fg=colour)
        click.echo(f"  {sign} {label:<32}{shown}{meaning if ok else f'expected: {expected}'}")


def _print_title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)
