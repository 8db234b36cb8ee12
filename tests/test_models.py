"""How databases are reached."""

from __future__ import annotations

import pytest

from clerkhooks.models import autocommit
from tests.conftest import MakeDatabase, MakeService

OPTIONS = "options=-csearch_path%3Dpublic&options=-c%20lock_timeout%3D9s"


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
