"""The pytest plugin signs as Clerk does, and the service verifies its signatures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import example, given
from hypothesis import strategies as st

import clerkhooks
from clerkhooks import create_app, current_session, require_auth
from clerkhooks.clerk.authorization import Preset, is_authorized, parse_organization
from clerkhooks.clerk.fake import FakeClerk, clerk_id, user_data
from clerkhooks.clerk.fake_claims import session_claims
from clerkhooks.settings import PROJECT
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.support import rows

names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=6).filter(
    lambda name: not name.startswith("sys_")
)
permissions = st.lists(st.builds("org:{}:{}".format, names, names), max_size=8)
listed = st.none() | st.builds("{}{}".format, st.sampled_from(["", "org:", "user:"]), names)


@given(granted=permissions, asked=permissions, feature=listed, plan=listed)
@example(granted=["org:org:_"], asked=["org:org:_"], feature=None, plan=None)
def test_packs_permissions_without_loss(
    granted: list[str], asked: list[str], feature: str | None, plan: str | None
) -> None:
    """A session has exactly the permissions that it was given, each once."""
    claims = {"v": 2} | session_claims(
        "org_1", role="org:admin", permissions=granted, feature=feature, plan=plan
    )
    organization = parse_organization(claims)
    assert organization is not None
    assert (organization.id, organization.role) == ("org_1", "org:admin")
    assert sorted(organization.permissions) == sorted(set(granted))
    for permission in asked:
        # Clerk's SDK collapses a repeated "org:" into one, so a permission of a feature named
        # "org" never matches.
        assert is_authorized(claims, permission=permission) is (
            re.sub("^(org:)*", "org:", permission) in granted
        )
    assert feature is None or is_authorized(claims, feature=feature)
    assert plan is None or is_authorized(claims, plan=plan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"permissions": ["org:sys_memberships:manage"]}, "system permission"),
        ({"permissions": ["org:admin"]}, "org:feature:action"),
        ({"permissions": ["org:notes:delete,org:notes:read"]}, "org:feature:action"),
        ({"plan": "team:pro"}, "may begin with org: or user:"),
        ({"feature": "team:ai"}, "may begin with org: or user:"),
    ],
)
def test_refuses_to_grant_what_clerk_cannot_grant(
    clerk_service: ClerkService, wrong: dict[str, Any], message: str
) -> None:
    """A test with permissions that Clerk cannot grant would prove nothing about production."""
    with pytest.raises(ValueError, match=message):
        clerk_service.token("user_1", **wrong)


def test_signs_up_a_user(clerk_service: ClerkService, clerkhooks_config: dict[str, Any]) -> None:
    """The row contains the event's data, and a test can choose the event's fields."""
    user_id = clerk_service.sign_up(
        email="grace@example.org", first_name="Grace", last_name="Hopper", image_url=None
    )
    stored = rows(clerkhooks_config["DATABASE_URL"], "SELECT id, email, name, image_url FROM users")
    assert stored == [(user_id, "grace@example.org", "Grace Hopper", None)]
    assert clerk_service.sign_up(id="user_2chosen") == "user_2chosen"


def test_fails_if_a_sign_up_is_refused(clerk_service: ClerkService) -> None:
    """``sign_up`` raises an AssertionError if the service refuses the new user."""
    with pytest.raises(AssertionError, match=r"400.*user_id_malformed"):
        clerk_service.sign_up(id="ada")


def test_delivers_events_in_their_order(clerk_service: ClerkService) -> None:
    """Each event is newer than the one before, even in the same millisecond; a retry is not."""
    user_id = clerk_service.sign_up()
    for number in range(20):
        data = user_data(
            user_id, email=None, first_name=f"Ada {number}", last_name=None, updated_at=0
        )
        del data["updated_at"]
        assert clerk_service.deliver("user.updated", data).get_json()["outcome"] == "applied"
    gone = {"deleted": True, "id": user_id, "object": "user"}
    assert clerk_service.deliver("user.deleted", gone, "msg_1").get_json()["outcome"] == "applied"
    assert (
        clerk_service.deliver("user.deleted", gone, "msg_1", int(time.time()) + 5).get_json()[
            "outcome"
        ]
        == "duplicate"
    )
    late = clerk_service.deliver("user.deleted", gone, timestamp=int(time.time()) - 301)
    assert (late.status_code, late.get_json()["reason"]) == (401, "timestamp_out_of_tolerance")
    assert clerk_service.client(user_id).get("/api/me").get_json()["reason"] == "user_deleted"


def test_signs_in_with_a_fresh_token_for_every_request(clerk_service: ClerkService) -> None:
    """A client is one session with a new token per request; two clients are two sessions."""
    seen = []

    @clerk_service.app.get("/seen")
    @require_auth
    def see() -> dict[str, object]:
        seen.append((current_session.id, current_session.claims["jti"]))
        return {"v": current_session.claims["v"], "organization": current_session.organization}

    client, other = clerk_service.client("user_1"), clerk_service.client("user_1")
    assert [each.get("/seen").get_json() for each in (client, client, other)] == [
        {"v": 2, "organization": None}
    ] * 3
    assert len(set(seen)) == 3
    assert len({session for session, _ in seen}) == 2


class CountingClient(FlaskClient):
    """An application's custom test client, which counts its requests."""

    count = 0

    def open(self, *args: Any, **kwargs: Any) -> Any:
        """Count the request, and send it."""
        self.count += 1
        return super().open(*args, **kwargs)


def test_signs_in_with_the_applications_own_client(
    clerk_service: ClerkService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client is an instance of ``app.test_client_class`` and has its methods."""
    monkeypatch.setattr(clerk_service.app, "test_client_class", CountingClient)
    client = clerk_service.client("user_1")
    assert isinstance(client, CountingClient)
    with client:
        assert client.get("/api/me").get_json()["id"] == "user_1"
    assert client.put("/api/me/presence", json={"isOnline": True}).status_code == 200
    assert client.count == 2


def test_lets_a_request_bring_its_own_authorization(clerk_service: ClerkService) -> None:
    """An Authorization header that a test passes replaces the client's."""
    response = clerk_service.client("user_1").get("/api/me", headers={"Authorization": "Bearer x"})
    assert response.get_json()["reason"] == "token_malformed"


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"fva": [0, 0]}, 200),
        ({"fva": [2000, 2000]}, 403),
        ({"fva": None}, 403),
        ({"act": {"sub": "user_2"}, "fva": [0, -1]}, 200),
        ({"lifetime": -60}, 401),
        ({"azp": "https://evil.example.com"}, 401),
        ({"header": {"typ": "at+jwt"}}, 401),
    ],
)
def test_takes_any_claims(
    clerk_service: ClerkService, claims: dict[str, object], status: int
) -> None:
    """The claims passed by a test are signed unchanged and verified as usual."""
    preset: Preset = "strict"
    clerk_service.app.add_url_rule(
        "/strict", view_func=require_auth(reverification=preset)(lambda: "done")
    )
    client = clerk_service.client("user_1", **claims)  # type: ignore[arg-type]
    assert client.get("/strict").status_code == status


def test_uses_one_organization_by_default(clerk_service: ClerkService) -> None:
    """Organization claims imply the default organization; other claims imply no organization."""

    @clerk_service.app.get("/where")
    @require_auth
    def where() -> dict[str, str | None]:
        return {"id": current_session.organization.id if current_session.organization else None}

    def place(client: FlaskClient) -> str | None:
        return str(found) if (found := client.get("/where").get_json()["id"]) else None

    own, other = clerk_service.organization_id, clerk_id("org")
    for client in (
        clerk_service.client("user_1", role="org:admin"),
        clerk_service.client("user_2", permissions=["org:notes:read"]),
        clerk_service.client("user_3", plan="org:pro"),
    ):
        assert place(client) == own
    assert place(clerk_service.client("user_1", organization=other)) == other
    assert place(clerk_service.client("user_1", plan="pro", feature="user:ai")) is None


def test_trusts_only_its_own_keys(clerkhooks_app: Flask) -> None:
    """No verification is patched, so another instance's signatures are refused."""
    stranger = ClerkService(clerkhooks_app, FakeClerk())
    with pytest.raises(AssertionError, match=r"401.*signature_mismatch"):
        stranger.sign_up()
    assert (
        stranger.client("user_1").get("/api/me").get_json()["reason"] == "token_signature_mismatch"
    )


def test_is_loaded_by_nothing_but_tests() -> None:
    """No module except the plugin imports pytest or the plugin, so production needs neither."""
    files = list(Path(clerkhooks.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        if file.name != "testing.py":
            assert not re.search(
                r"\b(import|from) +(pytest|clerkhooks\.testing)\b|clerkhooks import .*\btesting\b",
                file.read_text(),
            )


def test_closes_the_connections_of_a_test(clerkhooks_config: dict[str, Any]) -> None:
    """``disconnect`` closes the connections of an application that a test creates."""
    app = create_app(clerkhooks_config)
    pool: Any = app.extensions["clerkhooks"].store.database.engine.pool
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    assert app.test_client().get("/readyz").status_code == 200
    assert pool.checkedin() == 1
    disconnect(app)
    assert app.extensions["clerkhooks"].store.database.engine.pool.checkedin() == 0


def run_pytest(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Write *files*, and run pytest on them without this suite's options and variables."""
    for name, text in files.items():
        (folder / name).write_text(text)
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), "."]
    return subprocess.run(
        command,
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CONFTEST = """
from clerkhooks.testing import ClerkService

pytest_plugins = ["clerkhooks.testing"]
"""

TEST = """
def test_mine(clerk_service):
    client = clerk_service.client(clerk_service.sign_up(email=None))
    assert client.get("/api/me").json["name"] == "Ada Lovelace"
"""


@pytest.mark.slow
def test_works_for_the_service(tmp_path: Path) -> None:
    """One line in conftest.py suffices, and there is no warning."""
    done = run_pytest(tmp_path, {"conftest.py": CONFTEST, "test_mine.py": TEST})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


SHOP = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import ClerkHooks, ClerkUser, from_clerk, require_auth


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class User(ClerkUser, db.Model):
    username: Mapped[str | None] = from_clerk("username")
    plan: Mapped[str] = mapped_column(server_default="free")


hooks = ClerkHooks(db, User)


def create_app(config):
    app = Flask("shop")
    app.config.update(config)
    db.init_app(app)
    hooks.init_app(app, url_prefix="/auth")

    @app.get("/plan")
    @require_auth
    def plan():
        return {"username": hooks.current_user.username, "plan": hooks.current_user.plan}

    return app
"""

SHOP_TEST = """
import pytest

from shop import create_app


@pytest.fixture
def clerkhooks_app(clerkhooks_config):
    return create_app(clerkhooks_config)


@pytest.mark.parametrize("turn", [1, 2])
def test_has_a_database_of_its_own(clerk_service, turn):
    assert clerk_service.app.test_client().get("/plan").status_code == 401
    client = clerk_service.client(clerk_service.sign_up(username="ada"))
    assert client.get("/plan").json == {"username": "ada", "plan": "free"}
    assert client.get("/auth/api/me").json["email"] == "ada@example.org"
    with clerk_service.app.app_context():
        from shop import User, db

        assert db.session.query(User).count() == 1
"""


def test_works_in_an_application(tmp_path: Path) -> None:
    """An application overrides one fixture to test its own model, URL prefix and views."""
    files = {"conftest.py": CONFTEST, "shop.py": SHOP, "test_shop.py": SHOP_TEST}
    done = run_pytest(tmp_path, files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
