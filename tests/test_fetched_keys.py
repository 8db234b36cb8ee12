"""Fetched keys in a whole service: asked for as a worker starts, and a 503 while there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clerkhooks import create_app
from clerkhooks.auth import fetch_keys_soon, find_keys
from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.settings import Settings
from clerkhooks.testing import disconnect
from tests.issuer import Issuer, answering, jwk, reason_of, settle
from tests.server import serving

CLERK, OTHER = PretendedClerk(), PretendedClerk()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An endpoint that publishes the key of CLERK."""
    with Issuer(jwk(CLERK)).open() as issuer:
        yield issuer
    settle()


def test_fetches_before_the_first_call(issuer: Issuer, clerkhooks_settings: Settings) -> None:
    """A worker that has just started asks at once, so that nobody waits."""
    app = create_app(replace(clerkhooks_settings, jwt_keys=(), jwks_url=issuer.url))
    fetch_keys_soon(app)
    issuer.wait_for(1)
    settle()
    token = CLERK.session_token(clerk_id("user"))
    assert app.test_client().get("/api/me", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert len(issuer.requests) == 1
    disconnect(app)


def test_answers_503_while_there_is_no_key(issuer: Issuer, clerkhooks_settings: Settings) -> None:
    """It is nobody's fault who calls: never 401, never 500, and a time to come back."""
    issuer.behaviour = answering(b"", 500)
    app = create_app(replace(clerkhooks_settings, jwt_keys=(), jwks_url=issuer.url))
    for authorization in (f"Bearer {CLERK.session_token(clerk_id('user'))}", "Bearer a.b.c", "Basic x", None):
        response = app.test_client().get("/api/me", headers={"Authorization": authorization} if authorization else {})
        assert (response.status_code, response.get_json()["reason"]) == (503, "keys_unavailable")
        assert 1 <= int(response.headers["Retry-After"]) <= 30
    assert len(issuer.requests) == 1
    disconnect(app)


def test_asks_the_backend_api_with_the_secret_key(issuer: Issuer, clerkhooks_settings: Settings) -> None:
    """Where no publishable key names a Frontend API, the secret key does as well, and shows nowhere."""
    settings = replace(clerkhooks_settings, jwt_keys=(), jwks_url=None, secret_key="sk_test_abc", api_url=issuer.origin)
    keys = find_keys(settings)
    assert isinstance(keys, FetchedKeys)
    assert reason_of(keys, CLERK) is None
    ((headers, _),) = issuer.requests
    assert (headers[":path"], headers["authorization"]) == ("/v1/jwks", "Bearer sk_test_abc")
    assert "sk_test_abc" not in repr(keys)


def test_keeps_keys_for_each_worker(issuer: Issuer, clerkhooks_settings: Settings, tmp_path: Path) -> None:
    """Both workers ask for themselves as they start, on connections of their own, and not again for any token."""
    variables = {"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": issuer.url}
    with serving(clerkhooks_settings.database_url, CLERK, tmp_path / "server.log", **variables) as server:
        issuer.wait_for(2)
        tokens = {None: CLERK.session_token(clerk_id("user")), "unknown_key": OTHER.session_token(clerk_id("user"), header={"kid": "x"})}
        for _ in range(8):
            answers = {reason: server.request("GET", "/api/me", headers={"Authorization": f"Bearer {tokens[reason]}"}) for reason in tokens}
            assert [answer.json().get("reason") for answer in answers.values()] == list(tokens)
    assert len({client for _, client in issuer.requests}) == len(issuer.requests) == 2
