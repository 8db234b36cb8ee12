"""The demonstration of ``clerkhooks dev``: signed requests, and the answers they must get."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import httpx

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.cli.options import mark, print_table

_QUERY = "SELECT id, name, email, date(deleted_at) FROM users ORDER BY created_at"


class Demonstration:
    """Webhooks and API calls of three users, for the service at *url*, which trusts *clerk*."""

    def __init__(self, clerk: FakeClerk, url: str) -> None:
        self.clerk, self.url = clerk, url
        self.ada, self.grace, self.alan = (clerk_id("user") for _ in range(3))
        self._start = int(time.time() * 1000) - 100
        self._results: list[bool] = []

    def run(self, database: Path) -> bool:
        """Send all requests, check the rows in *database*; return whether every check passed."""
        self._show_ordering()
        self._show_first_call()
        self._show_deletion()
        self._show_table(database)
        failed, total = self._results.count(False), len(self._results)
        text = f"{failed} of {total} checks failed." if failed else f"All {total} checks passed."
        click.secho(f"\n{mark(not failed)} {text}", fg="red" if failed else "green")
        return not failed

    def expected_rows(self) -> list[tuple[str, str, str | None, bool]]:
        """Return id, name, email and whether the user is deleted, for every row at the end."""
        return [
            (self.ada, "Ada Lovelace", "ada@example.org", False),
            (self.grace, "Grace Hopper", "grace@example.org", False),
            (self.alan, "Deleted User", None, True),
        ]

    def _show_ordering(self) -> None:
        _print_title("Ada signs up. Webhooks are repeated, late or forged; her row stays correct.")
        created = self._user_event("user.created", self.ada, "Ada Byron")
        renamed = self._user_event("user.updated", self.ada, "Ada Lovelace", 50)
        older = self._user_event("user.updated", self.ada, "Ada King", 30)
        headers = self.clerk.headers(renamed)
        forged = FakeClerk(private_key=self.clerk.private_key).headers(renamed)
        webhook = self._send_webhook
        webhook("user.created", created, "200 applied", "the row is inserted")
        webhook("user.updated", renamed, "200 applied", "the name changes", headers)
        webhook("user.updated, repeated", renamed, "200 duplicate", "nothing changes", headers)
        webhook("user.updated, older", older, "200 stale", "the newer name stays")
        webhook(
            "user.updated, forged", renamed, "401 signature_mismatch", "nothing changes", forged
        )

    def _show_first_call(self) -> None:
        _print_title("Grace calls the API before her webhook arrives.")
        created = self._user_event("user.created", self.grace, "Grace Hopper")
        self._call_api(self.grace, "200 New User", "the call inserts the row")
        self._send_webhook("user.created", created, "200 applied", "the webhook fills it in")
        self._call_api(self.grace, "200 Grace Hopper", "the API returns her name")

    def _show_deletion(self) -> None:
        _print_title("Alan deletes his account. The deletion is final.")
        created = self._user_event("user.created", self.alan, "Alan Turing")
        updated = self._user_event("user.updated", self.alan, "Al Turing", 20)
        data = {"deleted": True, "id": self.alan, "object": "user"}
        deleted = event_body("user.deleted", data, self._start)
        webhook = self._send_webhook
        webhook("user.created", created, "200 applied", "the row is inserted")
        webhook("user.deleted", deleted, "200 applied", "name, email and image are erased")
        webhook("user.updated, late", updated, "200 stale", "the user stays deleted")
        self._call_api(self.alan, "401 user_deleted", "his session token is refused")

    def _show_table(self, database: Path) -> None:
        rows = read_rows(database)
        actual = [(*row[:3], row[3] is not None) for row in rows]
        self._results.append(actual == self.expected_rows())
        _print_title("The users table:")
        print_table(("id", "name", "email", "deleted_at"), rows)

    def _user_event(self, event_type: str, user_id: str, name: str, after: int = 0) -> bytes:
        """Return an event of a user; *after* is in milliseconds since the sign-up."""
        first_name, last_name = name.split()
        data = user_data(
            user_id,
            email=f"{first_name.lower()}@example.org",
            first_name=first_name,
            last_name=last_name,
            updated_at=self._start + after,
        )
        return event_body(event_type, data, self._start + after)

    def _send_webhook(
        self,
        label: str,
        body: bytes,
        expected: str,
        meaning: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = headers or self.clerk.headers(body)
        answer = self._request("POST", "/webhooks/clerk", headers, body)
        self._report(f"webhook {label}", answer, expected, meaning)

    def _call_api(self, user_id: str, expected: str, meaning: str) -> None:
        headers = {"Authorization": f"Bearer {self.clerk.session_token(user_id)}"}
        self._report("GET /api/me", self._request("GET", "/api/me", headers), expected, meaning)

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> str:
        """Return the status, and the outcome, reason or name; or why there is no answer."""
        url = f"{self.url}{path}"
        try:
            response = httpx.request(
                method, url, headers=headers, content=body, timeout=10, trust_env=False
            )
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            return f"no answer ({type(error).__name__})"
        told = [answer[key] for key in ("outcome", "reason", "name") if key in answer]
        return " ".join([str(response.status_code), *told[:1]])

    def _report(self, label: str, answer: str, expected: str, meaning: str) -> None:
        ok = answer == expected
        self._results.append(ok)
        colour = "green" if ok else "red"
        sign, shown = click.style(mark(ok), fg=colour), click.style(f"{answer:<26}", fg=colour)
        click.echo(f"  {sign} {label:<32}{shown}{meaning if ok else f'expected: {expected}'}")


def read_rows(database: Path) -> list[tuple[str, str, str | None, str | None]]:
    """Return the users in *database*, oldest row first, read without the service."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(_QUERY).fetchall()


def _print_title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)
