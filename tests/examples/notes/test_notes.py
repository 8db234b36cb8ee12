"""The notes API, as signed-in users and strangers meet it."""

import pytest
from flask import Flask
from flask.testing import FlaskClient

from clerkhooks.testing import ClerkService
from tests.examples.notes import blueprint


@pytest.fixture
def clerkhooks_app(clerkhooks_app: Flask) -> Flask:
    """The application under test: wsgi.py does the same."""
    clerkhooks_app.register_blueprint(blueprint)
    return clerkhooks_app


def texts(client: FlaskClient) -> list[str]:
    """The texts that a caller is shown."""
    return [note["text"] for note in client.get("/api/notes/").get_json()]


def test_keeps_the_notes_of_each_user(clerk_service: ClerkService) -> None:
    """Everyone lists what they wrote, and nobody else's."""
    ada, grace = (clerk_service.client(clerk_service.sign_up(first_name=name)) for name in ("Ada", "Grace"))
    assert ada.post("/api/notes/", json={"text": "Poetical science"}).status_code == 201
    assert grace.post("/api/notes/", json={"text": "A moth"}).status_code == 201
    assert (texts(ada), texts(grace)) == (["Poetical science"], ["A moth"])


def test_takes_a_note_before_the_webhook(clerk_service: ClerkService) -> None:
    """A user whom no webhook has announced yet can write all the same."""
    early = clerk_service.client("user_2early")
    assert early.post("/api/notes/", json={"text": "First!"}).status_code == 201
    assert texts(early) == ["First!"]


@pytest.mark.parametrize("body", [[], {}, {"text": None}, {"text": 7}])
def test_refuses_what_is_no_note(clerk_service: ClerkService, body: object) -> None:
    """A note is a text."""
    assert clerk_service.client(clerk_service.sign_up()).post("/api/notes/", json=body).status_code == 400


def test_lets_only_admins_delete_a_note(clerk_service: ClerkService) -> None:
    """Not even its author may, without the role; nor may the admin of another organization."""
    author = clerk_service.client(clerk_service.sign_up(), role="org:member")
    admin = clerk_service.client(clerk_service.sign_up(), role="org:admin")
    stranger = clerk_service.client(clerk_service.sign_up(), role="org:admin", organization="org_2other")
    path = f"/api/notes/{author.post('/api/notes/', json={'text': 'Delete me'}).get_json()['id']}"
    answers = [client.delete(path).status_code for client in (author, stranger, admin, admin)]
    assert answers == [403, 404, 204, 404]
    assert texts(author) == []


def test_asks_to_sign_in(clerk_service: ClerkService) -> None:
    """Without a token there are no notes."""
    response = clerk_service.http.get("/api/notes/")
    assert (response.status_code, response.get_json()["reason"]) == (401, "token_missing")


def test_welcomes_everyone(clerk_service: ClerkService) -> None:
    """The public page is for strangers too, but not for a token that does not hold."""
    user_id = clerk_service.sign_up(first_name="Ada", last_name="Lovelace")
    assert clerk_service.http.get("/api/notes/welcome").get_json() == {"greeting": "Hello! Please sign in."}
    assert clerk_service.client(user_id).get("/api/notes/welcome").get_json() == {"greeting": "Hello Ada Lovelace!"}
    assert clerk_service.client(user_id, lifetime=-60).get("/api/notes/welcome").status_code == 401
