"""Databases for the applications."""

from __future__ import annotations

import pytest

from tests.conftest import KINDS, MakeDatabase


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, emptied_database: MakeDatabase) -> str:
    """Return the URL of an empty database of each kind."""
    return emptied_database(request.param)


@pytest.fixture
def sqlite_url(make_database: MakeDatabase) -> str:
    """Create an empty SQLite file."""
    return make_database("sqlite")


@pytest.fixture
def postgresql_url(emptied_database: MakeDatabase) -> str:
    """Return the URL of an empty PostgreSQL database."""
    return emptied_database("postgresql")
