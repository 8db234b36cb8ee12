"""The main job, shown on a running server: each step is one HTTP request and the answer that it must get."""

from __future__ import annotations

import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from clerkhooks.cli.server import ask

STEP = 10  # milliseconds between the events of a person
Row = tuple[str, str, str | None, str | None]


@dataclass(frozen=True)
class Step:
    """One request, the answer that it must get, and what a reader learns from it."""

    says: str
    expected: str
    meaning: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Person:
    """Somebody who signs up: as Clerk knows them from the event of *signed_up* (milliseconds) on."""

    id: str
    first_name: str
    last_name: str
    email: str
    signed_up: int

    def event(self, event_type: str, steps: int = 0, **changes: str) -> bytes:
        """The event of a profile as it was some *steps* after the sign-up."""
        at = self.signed_up + steps * STEP
        names: dict[str, Any] = {
            "first_name": self.first_name,
            "last_name": self.last_name,
        } | changes
        return event_body(
            event_type, user_data(self.id, email=self.email, updated_at=at, **names), at
        )


class Story:
    """Ada, Grace and Alan, what happens to them, and the rows that must come of it."""

    def __init__(self, clerk: FakeClerk) -> None:
        self.clerk = clerk
        start = int(time.time() * 1000) - 10 * STEP
        self.ada = Person(clerk_id("user"), "Ada", "Byron", "ada@example.org", start)
        self.grace = Person(clerk_id("user"), "Grace", "Hopper", "grace@example.org", start)
        self.alan = Person(clerk_id("user"), "Alan", "Turing", "alan@example.org", start)

    def rows(self) -> list[tuple[str, str, str | None, bool]]:
        """Id, name, email and whether it is deleted, of every row in the end."""
        return [
            (self.ada.id, "Ada Lovelace", self.ada.email, False),
            (self.grace.id, "Grace Hopper", self.grace.email, False),
            (self.alan.id, "Deleted User", None, True),
        ]

    def scenes(self) -> list[tuple[str, list[Step]]]:
        """What happens, in order."""
        return [
            (
                "Ada signs up. Clerk's webhooks come twice, late and forged, and her row stays right.",
                self._ada(),
            ),
            ("Grace is faster than her webhook.", self._grace()),
            ("Alan deletes his account, and that is final.", self._alan()),
        ]

    def _ada(self) -> list[Step]:
        married = self.ada.event("user.updated", 5, last_name="Lovelace")
        earlier = self.ada.event("user.updated", 3, last_name="King")
        forged = self._webhook(
            "user.updated, forged", "401 signature_mismatch", "a stranger gets nowhere", married
        )
        forged.headers["svix-signature"] = FakeClerk(private_key=self.clerk.private_key).headers(
            married
        )["svix-signature"]
        message_id = clerk_id("msg")
        return [
            self._webhook(
                "user.created", "200 applied", "Ada Byron has a row", self.ada.event("user.created")
            ),
            self._webhook(
                "user.updated", "200 applied", "now she is Ada Lovelace", married, message_id
            ),
            self._webhook(
                "user.updated, repeated",
                "200 duplicate",
                "each message is done once",
                married,
                message_id,
            ),
            self._webhook("user.updated, older", "200 stale", "the newer name stays", earlier),
            forged,
        ]

    def _grace(self) -> list[Step]:
        signed_up = self.grace.event("user.created")
        return [
            self._call(self.grace, "200 New User", "her first call makes the row"),
            self._webhook("user.created", "200 applied", "the webhook fills it in", signed_up),
            self._call(self.grace, "200 Grace Hopper", "and the API knows her"),
        ]

    def _alan(self) -> list[Step]:
        signed_up, changed = (
            self.alan.event("user.created"),
            self.alan.event("user.updated", 2, first_name="Al"),
        )
        deletion = event_body(
            "user.deleted",
            {"deleted": True, "id": self.alan.id, "object": "user"},
            self.alan.signed_up,
        )
        return [
            self._webhook("user.created", "200 applied", "Alan Turing has a row", signed_up),
            self._webhook(
                "user.deleted", "200 applied", "name, email and image are erased", deletion
            ),
            self._webhook("user.updated, too late", "200 stale", "nothing revives him", changed),
            self._call(self.alan, "401 user_deleted", "nor does a token that outlived him"),
        ]

    def _webhook(
        self, says: str, expected: str, meaning: str, body: bytes, message_id: str | None = None
    ) -> Step:
        headers = self.clerk.headers(body, message_id)
        return Step(f"webhook {says}", expected, meaning, "POST", "/webhooks/clerk", headers, body)

    def _call(self, person: Person, expected: str, meaning: str) -> Step:
        headers = {"Authorization": f"Bearer {self.clerk.session_token(person.id)}"}
        return Step("GET /api/me", expected, meaning, "GET", "/api/me", headers)


def show(story: Story, port: int, database: Path) -> bool:
    """Tell *story* to the server on *port*, print what happens, and say whether all of it was right."""
    verdicts = []
    for title, steps in story.scenes():
        click.secho(f"\n{title}", bold=True)
        verdicts += [_take(step, port) for step in steps]
    rows = read_rows(database)
    right = [(*row[:3], row[3] is not None) for row in rows] == story.rows()
    click.secho("\nThe users table now, read from the file:", bold=True)
    _print_table(rows)
    wrong = verdicts.count(False) + (not right)
    if wrong:
        click.secho(f"\n{mark(False)} {wrong} of {len(verdicts) + 1} checks failed.", fg="red")
    else:
        click.secho(
            f"\n{mark(True)} All {len(verdicts)} steps and the table are as they must be.",
            fg="green",
        )
    return not wrong


def mark(well: bool) -> str:
    """A tick or a cross, or what stands for them where the terminal's encoding has none."""
    try:
        "✓✗".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "+" if well else "x"
    return "✓" if well else "✗"


def read_rows(database: Path) -> list[Row]:
    """The users in *database*, in the order of their creation, read behind the server's back."""
    query = "SELECT id, name, email, substr(deleted_at, 1, 19) FROM users ORDER BY created_at"
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def _take(step: Step, port: int) -> bool:
    answer = ask(port, step.method, step.path, step.headers, step.body)
    well = answer == step.expected
    colour = "green" if well else "red"
    told = step.meaning if well else f"expected: {step.expected}"
    click.echo(
        f"  {click.style(mark(well), fg=colour)} {step.says:<32}{click.style(f'{answer:<26}', fg=colour)}{told}"
    )
    return well


def _print_table(rows: list[Row]) -> None:
    lines = [
        ("id", "name", "email", "deleted_at"),
        *(tuple(value or "-" for value in row) for row in rows),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for number, line in enumerate(lines):
        text = "  ".join(
            f"{value:<{width}}" for value, width in zip(line, widths, strict=True)
        ).rstrip()
        click.secho(f"  {text}", dim=number == 0)
