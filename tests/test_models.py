"""How databases are reached."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from clerkhooks.cli.pretend import clerk_id
from clerkhooks.errors import describe
from clerkhooks.models import autocommit, db, execute_alone
from tests.conftest import MakeDatabase, MakeService, MigratedUrl
from tests.support import user_event

OPTIONS = "options=-csearch_path%3Dpublic&options=-c%20lock_timeout%3D9s%20-c%20timezone%3DAsia/Tokyo"


@pytest.mark.parametrize(("options", "expected"), [("", ["2s", "3s", "UTC", '"$user", public']), (OPTIONS, ["9s", "3s", "UTC", "public"])])
def test_keeps_its_limits_beside_options_of_the_url(
    make_database: MakeDatabase, make_service: MakeService, options: str, expected: list[str]
) -> None:
    """What an operator asks for in DATABASE_URL wins, and drops none of the timeouts that it does not name."""
    url = make_database("postgresql")
    service = make_service(DATABASE_URL=f"{url}{'&' if '?' in url else '?'}{options}")
    with service.app.app_context(), autocommit() as connection:
        names = ("lock_timeout", "statement_timeout", "timezone", "search_path")
        assert [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names] == expected


def test_tells_what_fails_as_sqlalchemy_does(make_service: MakeService, migrated: MigratedUrl) -> None:
    """Also where a statement is handed to the driver as it is: the class, the SQLSTATE, and nothing of the row."""
    service = make_service(DATABASE_URL=migrated("postgresql"))
    with service.app.app_context():
        with pytest.raises(DBAPIError) as raised:
            execute_alone(sa.select(sa.literal(1) / sa.bindparam("divisor", type_=sa.Integer)), {"divisor": 0})
        assert describe(raised.value) == "DataError 22012"
        assert execute_alone(sa.select(sa.bindparam("number", type_=sa.Integer)), {"number": 7}) == [(7,)]
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_replaces_a_connection_that_the_server_has_closed(make_service: MakeService, migrated: MigratedUrl) -> None:
    """Without an error for anybody: a closed socket is seen before it is used."""
    url = migrated("postgresql")
    service = make_service(DATABASE_URL=url)
    user_id = clerk_id("user")
    with service.app.app_context(), autocommit() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
        while other.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() != (0,):
            pass
    assert service.call(user_id).status_code == 200
    assert service.outcome(user_event(user_id)) == "applied"
