"""The example's migration lies beside it; an application's lies in ``migrations/versions/``, and this file is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.config import Config
from flask import Flask

from clerkhooks import create_app
from clerkhooks.settings import Settings
from clerkhooks.testing import Factory

MIGRATIONS = Path(__file__).parent / "migrations"


@pytest.fixture(scope="session")
def clerkhooks_factory() -> Factory:
    """The service, with the example's migration beside its own."""
    return create_notes_app


def create_notes_app(settings: Settings) -> Flask:
    """The service, which also finds the migration of the notes."""
    app = create_app(settings)

    @app.extensions["migrate"].migrate.configure  # type: ignore[untyped-decorator]
    def add_migrations(config: Config) -> Config:
        config.set_main_option("version_locations", f"{config.get_main_option('script_location')}/versions {MIGRATIONS}")
        config.set_main_option("path_separator", "space")
        return config

    return app
