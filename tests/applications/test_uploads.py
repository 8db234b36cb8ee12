"""An application that accepts uploads, with its own size limits."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, request

from clerkhooks import ClerkHooks
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables

MIB = 1024 * 1024
FORM = "multipart/form-data; boundary=xx"


def create_app(clerk: FakeClerk, url: str, **more: Any) -> Flask:
    """Create the application with four upload routes, two of which set their own limits."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url, **more))
    db.init_app(app)
    ClerkHooks(db).init_app(app)

    @app.post("/upload")
    def upload() -> dict[str, int]:
        return {"size": len(request.get_data())}

    @app.post("/form")
    def form() -> dict[str, int]:
        file = request.files["file"]
        size = len(file.read())
        file.close()
        return {"size": size}

    @app.post("/tiny")
    def tiny() -> dict[str, int]:
        request.max_content_length = 10
        return {"size": len(request.get_data())}

    @app.post("/huge")
    def huge() -> dict[str, int]:
        request.max_content_length = 10 * MIB
        return {"size": len(request.get_data())}

    return app


def multipart(content: bytes) -> bytes:
    """Return a multipart form with one file."""
    head = b'--xx\r\nContent-Disposition: form-data; name="file"; filename="file.bin"\r\n\r\n'
    return head + content + b"\r\n--xx--\r\n"


@pytest.mark.parametrize(
    ("limit", "answers"), [(None, (200, 200)), (10 * MIB, (200, 200)), (16, (413, 413))]
)
def test_limits_deliveries_only(
    clerk: FakeClerk, sqlite_url: str, limit: int | None, answers: tuple[int, int]
) -> None:
    """The application's limit applies only to uploads; the limit for deliveries is 1 MiB."""
    app = create_app(clerk, sqlite_url, MAX_CONTENT_LENGTH=limit)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        client, body = service.http, b"x" * (3 * MIB)
        upload = client.post("/upload", data=body)
        form = client.post("/form", data=multipart(body), content_type=FORM)
        assert (upload.status_code, form.status_code) == answers
        assert client.post("/tiny", data=b"x" * 11).status_code == 413
        assert client.post("/huge", data=body).get_json() == {"size": len(body)}
        data = {"id": "user_1", "object": "user", "public_metadata": {"text": "x" * 900_000}}
        assert service.deliver("user.created", data).status_code == 200
        refused = service.deliver_body(b"x" * (MIB + 1))
        assert (refused.status_code, refused.get_json()["reason"]) == (413, "body_too_large")
        ada = service.client(service.sign_up())
        assert ada.put("/api/me/presence", json={"isOnline": True}).status_code == 200


def test_leaves_refusals_to_the_application(clerk: FakeClerk, sqlite_url: str) -> None:
    """Oversized uploads get the application's page; oversized deliveries get problem details."""
    app = create_app(clerk, sqlite_url, MAX_CONTENT_LENGTH=MIB)
    app.register_error_handler(413, lambda error: ("Please send less.", 413))
    with tables(app):
        service = ClerkService(app, clerk)
        assert service.http.post("/upload", data=b"x" * (MIB + 1)).text == "Please send less."
        refused = service.deliver_body(b"x" * (MIB + 1))
        assert (refused.status_code, refused.mimetype) == (413, "application/problem+json")


def test_ignores_a_limit_set_for_every_route(clerk: FakeClerk, sqlite_url: str) -> None:
    """A limit that ``before_request`` sets for every route does not apply to deliveries."""
    app = create_app(clerk, sqlite_url, MAX_CONTENT_LENGTH=8, MAX_FORM_MEMORY_SIZE=8)

    @app.before_request
    def allow_little() -> None:
        request.max_content_length = 4

    with tables(app):
        check_users_stay_correct(app, clerk)
        assert app.test_client().post("/upload", data=b"12345").status_code == 413
        assert app.test_client().post("/upload", data=b"1234").get_json() == {"size": 4}
