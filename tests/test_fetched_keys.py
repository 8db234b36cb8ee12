"""Each worker fetches the signing keys when it starts. Without keys, calls get a 503."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.service import db
from clerkhooks.settings import Settings
from clerkhooks.web.auth import fetch_keys_soon, find_keys
from clerkhooks.web.state import disconnect
from tests.conftest import migrate
from tests.issuer import Issuer, answering, jwk, refusal_reason, wait_for_fetches
from tests.server import serving

CLERK, OTHER = FakeClerk(), FakeClerk()
Config = dict[str, Any]


def make_app(config: Config, **variables: str) -> Flask:
    """Create the service and its tables, without a configured key."""
    app = create_app(config | {"CLERK_JWT_KEY": ""} | variables)
    with app.app_context():
        db.create_all()
    return app


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """Run a JWKS endpoint that publishes CLERK's key."""
    with Issuer(jwk(CLERK)).open() as issuer:
        yield issuer
    wait_for_fetches()


def test_fetches_before_the_first_call(issuer: Issuer, clerkhooks_config: Config) -> None:
    """A worker fetches the keys when it starts, so that no call waits for them."""
    app = make_app(clerkhooks_config, CLERK_JWKS_URL=issuer.url)
    fetch_keys_soon(app)
    issuer.wait_for(1)
    wait_for_fetches()
    token = CLERK.session_token(clerk_id("user"))
    response = app.test_client().get("/api/me", headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == 200
    assert len(issuer.requests) == 1
    disconnect(app)


def test_answers_503_without_a_key(issuer: Issuer, clerkhooks_config: Config) -> None:
    """The caller is not at fault, so the response is 503 with Retry-After, never 401 or 500."""
    issuer.behaviour = answering(b"", 500)
    app = make_app(clerkhooks_config, CLERK_JWKS_URL=issuer.url)
    for authorization in (
        f"Bearer {CLERK.session_token(clerk_id('user'))}",
        "Bearer a.b.c",
        "Basic x",
        None,
    ):
        response = app.test_client().get(
            "/api/me", headers={"Authorization": authorization} if authorization else {}
        )
        assert (response.status_code, response.get_json()["reason"]) == (503, "keys_unavailable")
        assert 1 <= int(response.headers["Retry-After"]) <= 30
    assert len(issuer.requests) == 1
    disconnect(app)


def test_fetches_from_the_backend_api_with_the_secret_key(
    issuer: Issuer, clerkhooks_config: Config
) -> None:
    """The secret key is used if no publishable key is set, and is never shown."""
    variables = {"CLERK_SECRET_KEY": "sk_test_abc", "CLERK_API_URL": issuer.origin}
    unset = {"CLERK_JWT_KEY": "", "CLERK_PUBLISHABLE_KEY": ""}
    keys = find_keys(Settings.from_mapping(clerkhooks_config | variables | unset))
    assert isinstance(keys, FetchedKeys)
    assert refusal_reason(keys, CLERK) is None
    ((headers, _),) = issuer.requests
    assert (headers[":path"], headers["authorization"]) == ("/v1/jwks", "Bearer sk_test_abc")
    assert "sk_test_abc" not in repr(keys)


def test_fetches_once_for_each_worker(
    issuer: Issuer, clerkhooks_config: Config, tmp_path: Path
) -> None:
    """Each worker fetches the keys when it starts. Tokens do not cause another fetch."""
    variables = {"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": issuer.url}
    url = clerkhooks_config["DATABASE_URL"]
    migrate(url, CLERK)
    with serving(url, CLERK, tmp_path / "server.log", **variables) as server:
        issuer.wait_for(2)
        tokens = {
            None: CLERK.session_token(clerk_id("user")),
            "unknown_key": OTHER.session_token(clerk_id("user"), header={"kid": "x"}),
        }
        for _ in range(8):
            answers = {
                reason: server.request(
                    "GET", "/api/me", headers={"Authorization": f"Bearer {tokens[reason]}"}
                )
                for reason in tokens
            }
            assert [answer.json().get("reason") for answer in answers.values()] == list(tokens)
    assert len({client for _, client in issuer.requests}) == len(issuer.requests) == 2
