"""The example works: on both databases, in every order, and only as long as the application listens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.config import Config
from flask_migrate import downgrade, upgrade

from clerkhooks.cli.pretend import clerk_id, event_body
from clerkhooks.models import db
from clerkhooks.signals import event_processing
from tests.conftest import MakeService
from tests.examples.organizations import connect
from tests.support import NOW_MS, Service, left_to_migrate, user_event

MIGRATIONS = Path(__file__).parent / "migrations"


@pytest.fixture
def service(make_service: MakeService) -> Iterator[Service]:
    """A service whose application listens, with the application's migration beside the service's own."""
    service = make_service()
    connect()

    @service.app.extensions["migrate"].migrate.configure  # type: ignore[untyped-decorator]
    def add_migrations(config: Config) -> Config:
        config.set_main_option("version_locations", f"{config.get_main_option('script_location')}/versions {MIGRATIONS}")
        config.set_main_option("path_separator", "space")
        return config

    with service.app.app_context():
        upgrade()
    yield service
    event_processing._clear_state()
    with service.app.app_context():
        downgrade(revision="0003")


def organization(event_type: str, at: int, **data: Any) -> bytes:
    """An event of an organization."""
    times = {} if event_type.endswith("deleted") else {"updated_at": at}
    return event_body(f"organization.{event_type}", {"id": "org_1", "object": "organization"} | times | data, at)


def membership(event_type: str, at: int, role: str) -> bytes:
    """An event of a membership."""
    data = {"id": "orgmem_1", "organization": {"id": "org_1"}, "public_user_data": {"user_id": "user_1"}, "role": role, "updated_at": at}
    return event_body(f"organizationMembership.{event_type}", data, at)


def test_ends_the_same_in_every_order(service: Service) -> None:
    """Created, renamed, renamed again: the last name stays, whatever came when."""
    events = [organization("created", 1, name="Acne"), organization("updated", 2, name="Acme"), organization("updated", 3, name="Acme Inc")]
    for order in permutations(events):
        service.rows("DELETE FROM organizations")
        for body in order:
            assert service.outcome(body) == "applied"
        assert service.rows("SELECT id, name, version_updated_at FROM organizations") == [("org_1", "Acme Inc", 3)]


def test_keeps_what_is_deleted_deleted(service: Service) -> None:
    """A deletion is final, also when it comes first."""
    for order in permutations(
        [organization("created", 1, name="Acme"), organization("deleted", 2), organization("updated", 3, name="Acme")]
    ):
        service.rows("DELETE FROM organizations")
        for body in order:
            service.outcome(body)
        assert service.rows("SELECT name, version_updated_at FROM organizations WHERE deleted_at IS NOT NULL") == [(None, None)]


def test_stores_memberships(service: Service) -> None:
    """A membership may come before its organization and its user."""
    assert service.outcome(membership("updated", 2, "org:admin")) == "applied"
    assert service.outcome(membership("created", 1, "org:member")) == "applied"
    assert service.rows("SELECT organization_id, user_id, role FROM organization_memberships") == [("org_1", "user_1", "org:admin")]
    assert service.outcome(user_event(clerk_id("user"))) == "applied"


def test_does_each_message_once(service: Service) -> None:
    """A repeated message does not reach the application."""
    body = organization("created", 1, name="Acme")
    assert service.outcome(body, "msg_1") == "applied"
    service.rows("UPDATE organizations SET name = 'Touched', version_updated_at = NULL")
    assert service.outcome(body, "msg_1") == "duplicate"
    assert service.rows("SELECT name FROM organizations") == [("Touched",)]


def test_fails_whole(service: Service) -> None:
    """An event without an id is a 500 and is retried; other types go on working."""
    assert service.deliver(event_body("organization.created", {}, NOW_MS), "msg_1").status_code == 500
    assert service.rows("SELECT outcome, error FROM webhook_messages") == [("failed", "KeyError")]
    assert service.outcome(membership("created", 1, "org:member")) == "applied"


def test_migrates_what_it_models(service: Service) -> None:
    """The example's migration makes the example's tables, and the service's are left as they were."""
    with service.app.app_context():
        assert left_to_migrate("organizations", "organization_memberships") == []
        assert {"organizations", "organization_memberships"} <= set(sa.inspect(db.engine).get_table_names())
    assert service.http.get("/readyz").status_code == 200
