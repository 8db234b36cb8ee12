"""/healthz and /readyz, as a platform asks them."""

from __future__ import annotations

import pytest
from flask_migrate import downgrade

from tests.conftest import KINDS, MakeDatabase, MakeService
from tests.support import Service


def test_is_healthy_without_a_database(unreachable: Service) -> None:
    """Restarting the process would not bring the database back, so it is not asked."""
    assert unreachable.http.get("/healthz").get_json() == {"status": "ok"}


def test_is_not_ready_while_the_database_is_away(unreachable: Service) -> None:
    """Without a database no work can be done."""
    response = unreachable.http.get("/readyz")
    assert (response.status_code, response.get_json()["reason"]) == (503, "database_unavailable")


def test_is_ready_at_the_newest_migration(service: Service) -> None:
    """The schema is what this release knows."""
    assert service.http.get("/readyz").get_json() == {"status": "ok"}


def test_is_ready_at_a_migration_of_the_future(service: Service) -> None:
    """A later release has migrated already, and this process still serves."""
    [(revision,)] = service.rows("SELECT version_num FROM alembic_version")
    service.rows("UPDATE alembic_version SET version_num = 'ffff'")
    try:
        assert service.http.get("/readyz").status_code == 200
    finally:
        service.rows(f"UPDATE alembic_version SET version_num = '{revision}'")


@pytest.mark.parametrize("kind", KINDS)
def test_is_not_ready_before_the_first_migration(make_database: MakeDatabase, make_service: MakeService, kind: str) -> None:
    """An empty database is behind, whether it was never migrated or taken back."""
    url = make_database(kind)
    service = make_service(DATABASE_URL=url)
    assert service.http.get("/readyz").get_json()["reason"] == "schema_behind"
    with service.app.app_context():
        service.app.test_cli_runner().invoke(args=["db", "upgrade"], catch_exceptions=False)
        assert service.http.get("/readyz").status_code == 200
        downgrade(revision="base")
    assert service.http.get("/readyz").get_json()["reason"] == "schema_behind"
