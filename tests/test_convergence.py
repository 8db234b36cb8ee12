"""The promise: the users table is a function of the set of events, whatever their order, repetition and company."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

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
    stored_row,
)
from tests.racing import registered_handler
from tests.server import Server
from tests.support import Service


@dataclass
class Run:
    """A history under way: the service and the model see the same."""

    service: Service
    ids: list[str] = field(default_factory=lambda: [clerk_id("user") for _ in USERS])
    arrived: dict[str, set[Sent]] = field(default_factory=lambda: defaultdict(set))
    called: set[str] = field(default_factory=set)
    log: dict[str, tuple[str, int]] = field(default_factory=dict)

    def deliver(self, event: Sent, attempt: int = 0) -> None:
        """Deliver once more."""
        self.expect(
            event, self.service.outcome(event.body, event.message_id, int(time.time()) + attempt)
        )

    def expect(self, event: Sent, outcome: str) -> None:
        """A delivery came to *outcome*: applied is what changes the model, stale what does not, duplicate what the log knows."""
        was, arrived = self.log.get(event.message_id, ("failed", 0)), self.arrived[event.user_id]
        if was[0] != "failed":
            assert outcome == "duplicate"
            return
        called = event.user_id in self.called
        changes = expected_row(arrived, called) != expected_row(arrived | {event}, called)
        # One without a time that was pruned and comes again may count anew, by its attempt: it says the same as before.
        assert outcome in (
            {"applied", "stale"}
            if event in arrived and event.version[0] < 0
            else {"applied" if changes else "stale"}
        )
        arrived.add(event)
        self.log[event.message_id] = (outcome, was[1] + 1)

    def fail(self, event: Sent) -> None:
        """Deliver while the processing fails, which only the log may remember, and only if the message was not done."""
        outcome, attempts = self.log.get(event.message_id, ("failed", 0))
        with registered_handler(self.service.app, raise_always):
            status = self.service.deliver(event.body, event.message_id).status_code
        assert status == (500 if outcome == "failed" else 200)
        if outcome == "failed":
            self.log[event.message_id] = ("failed", attempts + 1)

    def call(self, user_id: str) -> None:
        """Call as the user: refused if deleted, answered with what the events say if not."""
        response = self.service.call(user_id)
        expected = expected_row(self.arrived[user_id], called=True) or {}
        assert response.status_code == (401 if expected["deleted"] else 200)
        if response.status_code == 200:
            self.called.add(user_id)
            answer = response.get_json()
            assert (answer["email"], answer["name"], answer["imageUrl"]) == (
                expected["email"],
                expected["name"],
                expected["image_url"],
            )

    def prune(self, message_ids: set[str]) -> None:
        """Forget messages."""
        for message_id in message_ids & self.log.keys():
            self.read(f"DELETE FROM webhook_messages WHERE message_id = '{message_id}'")
            del self.log[message_id]

    def check(self) -> None:
        """Both tables are what the model says."""
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
            f"SELECT message_id, outcome, attempts FROM webhook_messages WHERE clerk_user_id IN ({quoted(self.ids)})"
        )
        assert {row[0]: tuple(row[1:]) for row in log} == self.log

    def read(self, query: str) -> list[Any]:
        """Read or change the tables, on a connection that is already there: there are thousands of these."""
        with self.service.app.app_context(), db.engine.begin() as connection:
            result = connection.execute(sa.text(query))
            return list(result) if result.returns_rows else []


@pytest.mark.parametrize("pattern", [None, "*", "user.updated"])
@given(history=histories())
def test_ends_as_the_set_of_events_says(
    service: Service, pattern: str | None, history: History
) -> None:
    """Any order, with repetitions, calls and forgotten messages in between, with and without handlers: rows, answers and log are those of the model."""
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
    """Deliveries of several users in one transaction: outcomes, rows and log are those of the model, which takes them in turn."""
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
        users = service.app.extensions["clerkhooks"].users
        outcomes = users._apply_all([parse_event(message) for message in messages])
        for event, outcome in zip(batch, outcomes, strict=True):
            run.expect(event, outcome)
    run.check()


def test_agrees_with_the_model_at_every_step(service: Service) -> None:
    """New events, repetitions, failures, calls and prunes, as Hypothesis pleases: after each, both tables are those of the model."""

    class Machine(RuleBasedStateMachine):
        """The service and the model, step by step."""

        def __init__(self) -> None:
            super().__init__()
            self.run = Run(service)
            self.drafts: list[Draft] = []
            self.events: list[Sent] = []

        def new(self, draft: Draft) -> Sent:
            """The next event."""
            self.drafts = determined([*self.drafts, draft])
            self.events.append(self.drafts[-1].sent(self.run.ids, len(self.events)))
            return self.events[-1]

        @rule(drafts=st.lists(UPDATES, min_size=1, max_size=3))
        def update(self, drafts: list[Draft]) -> None:
            """New events, each delivered at once."""
            for draft in drafts:
                self.run.deliver(self.new(draft))

        @rule(draft=UPDATES)
        def update_in_vain(self, draft: Draft) -> None:
            """A new event, whose first attempt fails."""
            self.run.fail(self.new(draft))

        @rule(draft=DELETIONS)
        def delete(self, draft: Draft) -> None:
            """The end of a user."""
            self.run.deliver(self.new(draft))

        @precondition(lambda self: self.events)
        @rule(data=st.data(), attempt=ATTEMPTS)
        def repeat(self, data: st.DataObject, attempt: int) -> None:
            """A delivery of an event that was sent before."""
            self.run.deliver(data.draw(st.sampled_from(self.events)), attempt)

        @precondition(lambda self: self.events)
        @rule(data=st.data())
        def repeat_in_vain(self, data: st.DataObject) -> None:
            """An attempt that fails, of an event that was sent before."""
            self.run.fail(data.draw(st.sampled_from(self.events)))

        @rule(user=st.sampled_from(USERS))
        def call(self, user: int) -> None:
            """A user calls."""
            self.run.call(self.run.ids[user])

        @precondition(lambda self: self.run.log)
        @rule(data=st.data())
        def prune(self, data: st.DataObject) -> None:
            """Some of the log is forgotten."""
            self.run.prune(data.draw(st.sets(st.sampled_from(sorted(self.run.log)), min_size=1)))

        @invariant()
        def agrees(self) -> None:
            """Both tables are what the model says."""
            self.run.check()

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=settings().max_examples // 2, stateful_step_count=15),
    )


@settings(
    max_examples=settings().max_examples // 4, phases=[Phase.generate]
)  # a race does not shrink
@given(history=histories(fewest=12, most=24))
def test_ends_the_same_under_16_threads(server: Server, history: History) -> None:
    """Through two workers at once: no delivery or call fails, each message is done once, and the rows are those of the model."""
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
        server.rows(
            f"DELETE FROM webhook_messages WHERE message_id IN ({quoted(events[number].message_id for number in what)})"
        )
        return kind, "", 200, ""

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(take, [*history.steps, *history.steps]))
    check_answers(server, answers, pruned)
    deleted = {event.user_id for event in events if event.type == "user.deleted"}
    for user_id in ids:
        called = ("call", user_id, 200, "") in answers
        found = server.rows(f"SELECT {COLUMNS} FROM users WHERE id = '{user_id}'")
        expected = expected_row((event for event in events if event.user_id == user_id), called)
        assert [stored_row(row) for row in found] == ([expected] if expected else [])
        assert user_id in deleted or ("call", user_id, 401, "") not in answers


def check_answers(
    server: Server, answers: list[tuple[str, str, int, str]], pruned: set[str]
) -> None:
    """Every delivery was answered 200, each message once with what the log says and otherwise as a duplicate, unless it was forgotten."""
    outcomes: dict[str, list[str]] = defaultdict(list)
    for kind, key, status, outcome in answers:
        assert status in ((200, 401) if kind == "call" else (200,)), (kind, key, status)
        if kind == "deliver":
            outcomes[key].append(outcome)
    log = dict(
        server.rows(
            f"SELECT message_id, outcome FROM webhook_messages WHERE message_id IN ({quoted(outcomes)}) AND attempts = 1"
        )
    )
    for message_id, answered in outcomes.items():
        if message_id not in pruned:
            assert sorted(answered) == sorted(
                ["duplicate"] * (len(answered) - 1) + [log[message_id]]
            )


def quoted(texts: Iterable[str]) -> str:
    """*texts* as an SQL list."""
    return ", ".join(f"'{text}'" for text in texts)


def raise_always(_event: Event) -> None:
    """Let every message fail."""
    raise RuntimeError("in vain")


def do_nothing(_event: Event) -> None:
    """Have messages written in the transaction of handlers."""
