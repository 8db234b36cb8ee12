"""Tests of the notes application."""

from typing import Any

import pytest
from flask import Flask

from clerkhooks.testing import ClerkService
from tests.examples.notes.app import create_app


@pytest.fixture
def clerkhooks_app(clerkhooks_config: dict[str, Any]) -> Flask:
    """Create the application under test."""
    return create_app(clerkhooks_config)


def test_keeps_the_notes_of_each_user(clerk_service: ClerkService) -> None:
    """A user sees only their own notes."""
    ada = clerk_service.client(clerk_service.sign_up(first_name="Ada"))
    grace = clerk_service.client(clerk_service.sign_up(first_name="Grace"))
    assert ada.post("/notes/", json={"text": "Poetical science"}).status_code == 201
    assert grace.post("/notes/", json={"text": "A moth"}).status_code == 201
    assert [note["text"] for note in ada.get("/notes/").get_json()] == ["Poetical science"]
    assert [note["text"] for note in grace.get("/notes/").get_json()] == ["A moth"]
