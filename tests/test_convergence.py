"""The users table depends only on the set of events, not on their order or repetition."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from clerkhooks.clerk.events import parse_event
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.clerk.signatures import VerifiedMessage
from clerkhooks.events import Event
from clerkhooks.service import db
from tests.conftest import KINDS
from tests.model import (
    ATTEMPTS,
    COLUMNS,
    DELETIONS,
    UPDATES,
    USERS,
    Draft,
    History,
    Sent,
    determined,
    expected_row,
    histories,
    is_barred,
    stored_row,
)
from tests.racing import registered_handler
from tests.server import Server
from tests.support import Service, ThreadPool


@dataclass
class Run:
    """One run of a history against both the service and the model."""

    service: Service
    ids: list[str] = field(default_factory=lambda: [clerk_id("user") for _ in USERS])
    arrived: dict[str, set[Sent]] = field(default_factory=lambda: defaultdict(set))
    called: set[str] = field(default_factory=set)
    log: dict[str, tuple[str, int]] = field(default_factory=dict)

    def deliver(self, event: Sent, attempt: int = 0) -> None:
        """Deliver *event* with a timestamp that is *attempt* seconds from now."""
        timestamp = int(time.time()) + attempt
        self.expect(event, self.service.outcome(event.body, event.message_id, timestamp))

    def expect(self, event: Sent, outcome: str) -> None:
        """
        Check the outcome of a delivery and update the model.

        The outcome must be ``duplicate`` if the message is in the log, ``applied`` if the event
        changes the model's row, and ``stale`` otherwise.
        """
        was, arrived = self.log.get(event.message_id, ("failed", 0)), self.arrived[event.user_id]
        if was[0] != "failed":
            assert outcome == "duplicate"
            return
        called = event.user_id in self.called
        changes = expected_row(arrived, called) != expected_row(arrived | {event}, called)
        # An event with neither ``updated_at`` nor ``timestamp`` is ranked by its delivery attempt.
        # If it is pruned from the log and arrives again, it may be applied again, with the same
        # values.
        is_repeated_without_times = event in arrived and event.version[0] < 0
        expected = "applied" if changes else "stale"
        assert outcome in ({"applied", "stale"} if is_repeated_without_times else {expected})
        arrived.add(event)
        self.log[event.message_id] = (outcome, was[1] + 1)

    def fail(self, event: Sent) -> None:
        """
        Deliver with a failing handler.

        A duplicate changes nothing. Any other delivery changes only the log.
        """
        outcome, attempts = self.log.get(event.message_id, ("failed", 0))
        with registered_handler(self.service.app, raise_always):
            status = self.service.deliver(event.body, event.message_id).status_code
        assert status == (500 if outcome == "failed" else 200)
        if outcome == "failed":
            self.log[event.message_id] = ("failed", attempts + 1)

    def call(self, user_id: str) -> None:
        """Call the API as the user. A barred user gets a 401; other users get the model's row."""
        response = self.service.call(user_id)
        expected = expected_row(self.arrived[user_id], called=True) or {}
        assert response.status_code == (401 if is_barred(expected) else 200)
        if response.status_code == 200:
            self.called.add(user_id)
            answer = response.get_json()
            assert (answer["email"], answer["name"], answer["imageUrl"]) == (
                expected["email"],
                expected["name"],
                expected["image_url"],
            )

    def prune(self, message_ids: set[str]) -> None:
        """Delete messages from the log."""
        for message_id in message_ids & self.log.keys():
            self.read(f"DELETE FROM webhook_messages WHERE message_id = '{message_id}'")
            del self.log[message_id]

    def check(self) -> None:
        """Check that both tables agree with the model."""
        found = {
            row[0]: stored_row(row[1:])
            for row in self.read(
                f"SELECT id, {COLUMNS} FROM users WHERE id IN ({quoted(self.ids)})"
            )
        }
        expected = {
            user_id: expected_row(self.arrived[user_id], user_id in self.called)
            for user_id in self.ids
        }
        assert found == {user_id: row for user_id, row in expected.items() if row}
        log = self.read(
            "SELECT message_id, outcome, attempts FROM webhook_messages"
            f" WHERE clerk_user_id IN ({quoted(self.ids)})"
        )
        assert {row[0]: tuple(row[1:]) for row in log} == self.log

    def read(self, query: str) -> list[Any]:
        """Execute *query* on a pooled connection, because a run has thousands of queries."""
        with self.service.app.app_context(), db.engine.begin() as connection:
            result = connection.execute(sa.text(query))
            return list(result) if result.returns_rows else []


@pytest.mark.parametrize(
    "pattern", [None, "*", pytest.param("user.updated", marks=pytest.mark.slow)]
)
@given(history=histories())
def test_ends_as_the_set_of_events_says(
    service: Service, pattern: str | None, history: History
) -> None:
    """
    The rows, responses and log match the model for any order of events, calls and prunes.

    This is true with and without handlers.
    """
    run = Run(service)
    events = [draft.sent(run.ids, number) for number, draft in enumerate(history.events)]
    with registered_handler(service.app, do_nothing, pattern) if pattern else nullcontext():
        for step, what in history.steps:
            if step == "deliver":
                run.deliver(events[what[0]], what[1])
            elif step == "call":
                run.call(run.ids[what])
            else:
                run.prune({events[number].message_id for number in what})
    run.check()


@given(history=histories())
def test_writes_a_batch_as_its_events_one_by_one(service: Service, history: History) -> None:
    """Several users' events in one transaction have the same results as separate deliveries."""
    run = Run(service)
    events = [draft.sent(run.ids, number) for number, draft in enumerate(history.events)]
    batches: list[list[Sent]] = [[]]
    for event in (events[what[0]] for step, what in history.steps if step == "deliver"):
        if event.user_id in {other.user_id for other in batches[-1]}:
            batches.append([])
        batches[-1].append(event)
    for batch in batches:
        messages = [
            VerifiedMessage(event.message_id, int(time.time()), event.body.decode())
            for event in batch
        ]
        deliveries = service.app.extensions["clerkhooks"].deliveries
        outcomes = deliveries._apply_all([parse_event(message) for message in messages])
        for event, outcome in zip(batch, outcomes, strict=True):
            run.expect(event, outcome)
    run.check()


class Machine(RuleBasedStateMachine):
    """Runs the service and the model step by step."""

    service: ClassVar[Service]

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(self.service)
        self.drafts: list[Draft] = []
        self.events: list[Sent] = []

    def new(self, draft: Draft) -> Sent:
        """Add a new event to the run, and return its message."""
        self.drafts = determined([*self.drafts, draft])
        self.events.append(self.drafts[-1].sent(self.run.ids, len(self.events)))
        return self.events[-1]

    @rule(drafts=st.lists(UPDATES, min_size=1, max_size=3))
    def update(self, drafts: list[Draft]) -> None:
        """Deliver new events."""
        for draft in drafts:
            self.run.deliver(self.new(draft))

    @rule(draft=UPDATES)
    def fail_update(self, draft: Draft) -> None:
        """Deliver a new event with a failing handler."""
        self.run.fail(self.new(draft))

    @rule(draft=DELETIONS)
    def delete(self, draft: Draft) -> None:
        """Deliver the deletion of a user."""
        self.run.deliver(self.new(draft))

    @precondition(lambda self: self.events)
    @rule(data=st.data(), attempt=ATTEMPTS)
    def repeat(self, data: st.DataObject, attempt: int) -> None:
        """Deliver an earlier event again."""
        self.run.deliver(data.draw(st.sampled_from(self.events)), attempt)

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def fail_repeat(self, data: st.DataObject) -> None:
        """Deliver an earlier event again with a failing handler."""
        self.run.fail(data.draw(st.sampled_from(self.events)))

    @rule(user=st.sampled_from(USERS))
    def call(self, user: int) -> None:
        """Call the API as a user."""
        self.run.call(self.run.ids[user])

    @precondition(lambda self: self.run.log)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        """Delete some messages from the log."""
        self.run.prune(data.draw(st.sets(st.sampled_from(sorted(self.run.log)), min_size=1)))

    @invariant()
    def agrees(self) -> None:
        """Check that both tables agree with the model."""
        self.run.check()


def test_agrees_with_the_model_at_every_step(service: Service) -> None:
    """Both tables agree with the model after every step of a run."""
    run_state_machine_as_test(
        type("Machine", (Machine,), {"service": service}),
        settings=settings(max_examples=settings().max_examples // 2, stateful_step_count=15),
    )


@pytest.mark.parametrize("server", KINDS, indirect=True, scope="module")
# Shrinking is off, because a race cannot be reproduced exactly.
@settings(max_examples=settings().max_examples // 4, phases=[Phase.generate])
@given(history=histories(fewest=12, most=24))
def test_ends_the_same_under_16_threads(server: Server, history: History) -> None:
    """
    If 16 threads send requests to two workers, the rows still agree with the model.

    No delivery or call fails, and each message is processed once.
    """
    ids = [clerk_id("user") for _ in USERS]
    events = [draft.sent(ids, number) for number, draft in enumerate(history.events)]
    pruned = {
        events[number].message_id
        for step, what in history.steps
        if step == "prune"
        for number in what
    }

    def take(step: tuple[str, Any]) -> tuple[str, str, int, str]:
        kind, what = step
        if kind == "deliver":
            event, attempt = events[what[0]], int(time.time()) + what[1]
            answer = server.request(
                "POST",
                "/webhooks/clerk",
                event.body,
                server.clerk.headers(event.body, event.message_id, attempt),
            )
            return kind, event.message_id, answer.status, answer.json().get("outcome")
        if kind == "call":
            headers = {"Authorization": f"Bearer {server.clerk.session_token(ids[what])}"}
            return kind, ids[what], server.request("GET", "/api/me", headers=headers).status, ""
        message_ids = quoted(events[number].message_id for number in what)
        server.rows(f"DELETE FROM webhook_messages WHERE message_id IN ({message_ids})")
        return kind, "", 200, ""

    with ThreadPool(16) as pool:
        answers = list(pool.map(take, [*history.steps, *history.steps], timeout=60))
    check_answers(server, answers, pruned)
    barred = {
        event.user_id
        for event in events
        if event.type == "user.deleted" or event.state[:2] != (None, None)
    }
    for user_id in ids:
        called = ("call", user_id, 200, "") in answers
        found = server.rows(f"SELECT {COLUMNS} FROM users WHERE id = '{user_id}'")
        expected = expected_row((event for event in events if event.user_id == user_id), called)
        assert [stored_row(row) for row in found] == ([expected] if expected else [])
        assert user_id in barred or ("call", user_id, 401, "") not in answers


def check_answers(
    server: Server, answers: list[tuple[str, str, int, str]], pruned: set[str]
) -> None:
    """
    Check that every delivery has the status 200, and every call has the status 200 or 401.

    For each message that was not pruned, exactly one response must contain the logged outcome, and
    all other responses must contain ``duplicate``.
    """
    outcomes: dict[str, list[str]] = defaultdict(list)
    for kind, key, status, outcome in answers:
        assert status in ((200, 401) if kind == "call" else (200,)), (kind, key, status)
        if kind == "deliver":
            outcomes[key].append(outcome)
    log = dict(
        server.rows(
            "SELECT message_id, outcome FROM webhook_messages"
            f" WHERE message_id IN ({quoted(outcomes)}) AND attempts = 1"
        )
    )
    for message_id, answered in outcomes.items():
        if message_id not in pruned:
            expected = ["duplicate"] * (len(answered) - 1) + [log[message_id]]
            assert sorted(answered) == sorted(expected)


def quoted(texts: Iterable[str]) -> str:
    """Return the strings in *texts* as an SQL list."""
    return ", ".join(f"'{text}'" for text in texts)


def raise_always(_event: Event) -> None:
    """Raise an exception, so that every message fails."""
    raise RuntimeError("processing fails")


def do_nothing(_event: Event) -> None:
    """Do nothing. With a handler, messages take a different code path."""
