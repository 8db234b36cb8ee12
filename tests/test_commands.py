"""The commands of ``flask --app wsgi``."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import Result

from clerkhooks import messages
from clerkhooks.cli.pretend import clerk_id
from clerkhooks.models import WebhookMessage, db
from tests.support import Service, user_event


def run(service: Service, *arguments: str) -> Result:
    """Run a command as ``flask --app wsgi`` does."""
    return service.app.test_cli_runner().invoke(args=list(arguments))


def age(service: Service, message_id: str, **days: float) -> None:
    """Make a message's times older."""
    values = {name: datetime.now(UTC) - timedelta(days=number) for name, number in days.items()}
    with service.app.app_context():
        db.session.execute(db.update(WebhookMessage).where(WebhookMessage.message_id == message_id).values(values))
        db.session.commit()


def test_forgets_old_messages_and_no_users(service: Service) -> None:
    """What was last touched before the age goes; what was retried since stays; users stay; a late repetition is stale."""
    user_id = clerk_id("user")
    bodies = {name: user_event(user_id, at=at) for at, name in enumerate(("msg_old", "msg_retried", "msg_new"), 1)}
    for message_id, body in bodies.items():
        service.outcome(body, message_id)
    age(service, "msg_old", received_at=31, processed_at=31)
    age(service, "msg_retried", received_at=31, processed_at=29)
    result = run(service, "webhooks", "prune", "--older-than", "30d", "--json")
    assert (result.exit_code, json.loads(result.output)) == (0, {"pruned": 1})
    assert service.rows("SELECT message_id FROM webhook_messages ORDER BY 1") == [("msg_new",), ("msg_retried",)]
    assert service.outcome(bodies["msg_old"], "msg_old") == "stale"
    assert run(service, "webhooks", "prune").output == "0 messages forgotten.\n"


@pytest.mark.parametrize("count", [5, 6, 7])
def test_forgets_in_batches(service: Service, count: int) -> None:
    """Every old message goes, whether or not the last batch is full."""
    for _ in range(count):
        service.outcome(user_event(clerk_id("user")))
    with service.app.app_context():
        batches = list(messages.prune(datetime.now(UTC) + timedelta(days=1), batch=3))
    assert (sum(batches), max(batches)) == (count, 3)
    assert service.rows("SELECT count(*) FROM webhook_messages") == [(0,)]


@pytest.mark.parametrize("older_than", ["6d", "167h", "0w"])
def test_asks_before_it_forgets_what_may_come_again(service: Service, older_than: str) -> None:
    """Exactly-once ends where the log does, and Svix retries for days."""
    result = run(service, "webhooks", "prune", "--older-than", older_than)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert run(service, "webhooks", "prune", "--older-than", older_than, "--force").exit_code == 0


@pytest.mark.parametrize("older_than", ["30", "d", "-1d", "1y", "99999w", ""])
def test_refuses_an_age_that_is_none(service: Service, older_than: str) -> None:
    """Wrong use is status 2 and says what to write."""
    result = run(service, "webhooks", "prune", "--older-than", older_than)
    assert result.exit_code == 2
    assert "12h, 30d or 8w" in result.output


def test_explains_itself(service: Service) -> None:
    """Each command has --help."""
    for arguments in (["webhooks"], ["webhooks", "prune"]):
        result = run(service, *arguments, "--help")
        assert (result.exit_code, result.output.startswith("Usage:")) == (0, True)


def test_says_that_the_database_fails(unreachable: Service) -> None:
    """Without a traceback, and without the database's own words."""
    result = run(unreachable, "webhooks", "prune")
    assert result.exit_code == 2
    assert "OperationalError" in result.output
    assert "DELETE" not in result.output
