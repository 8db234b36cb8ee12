"""Requests that the notes application accepts or refuses."""

from typing import Any

import pytest
from flask import Flask

from clerkhooks.testing import ClerkService
from tests.examples.notes.app import create_app


@pytest.fixture
def clerkhooks_app(clerkhooks_config: dict[str, Any]) -> Flask:
    """Create the application under test."""
    return create_app(clerkhooks_config)


def test_takes_a_note_before_the_webhook(clerk_service: ClerkService) -> None:
    """A user can add a note before the webhook has arrived."""
    early = clerk_service.client("user_2early")
    assert early.post("/notes/", json={"text": "First!"}).status_code == 201
    assert [note["text"] for note in early.get("/notes/").get_json()] == ["First!"]


@pytest.mark.parametrize("body", [[], {}, {"text": None}, {"text": 7}])
def test_refuses_a_body_without_a_text(clerk_service: ClerkService, body: object) -> None:
    """A note must contain text."""
    ada = clerk_service.client(clerk_service.sign_up())
    assert ada.post("/notes/", json=body).status_code == 400


def test_lets_only_admins_delete_a_note(clerk_service: ClerkService) -> None:
    """Authors without the role and admins of other organizations may not delete a note."""
    author = clerk_service.client(clerk_service.sign_up(), role="org:member")
    admin = clerk_service.client(clerk_service.sign_up(), role="org:admin")
    stranger = clerk_service.client(
        clerk_service.sign_up(), role="org:admin", organization="org_2other"
    )
    path = f"/notes/{author.post('/notes/', json={'text': 'Delete me'}).get_json()['id']}"
    answers = [client.delete(path).status_code for client in (author, stranger, admin, admin)]
    assert answers == [403, 404, 204, 404]
    assert author.get("/notes/").get_json() == []


def test_asks_to_sign_in(clerk_service: ClerkService) -> None:
    """A call without a token is refused."""
    response = clerk_service.http.get("/notes/")
    assert (response.status_code, response.get_json()["reason"]) == (401, "token_missing")


def test_welcomes_everyone(clerk_service: ClerkService) -> None:
    """The public page greets anonymous callers and refuses an invalid token."""
    ada = clerk_service.sign_up(first_name="Ada", username="countess")
    welcome = "/notes/welcome"
    assert clerk_service.http.get(welcome).get_json() == {"greeting": "Please sign in."}
    assert clerk_service.client(ada).get(welcome).get_json() == {"greeting": "Hello countess!"}
    assert clerk_service.client(ada, lifetime=-60).get(welcome).status_code == 401
