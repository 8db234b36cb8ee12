"""The example's migration makes the table that the example models."""

from __future__ import annotations

from flask import Flask

from tests.support import left_to_migrate


def test_migrates_what_it_models(clerkhooks_app: Flask) -> None:
    """Nothing is left to migrate of the notes, and of the tables that they refer to."""
    with clerkhooks_app.app_context():
        assert left_to_migrate("notes") == []
