"""An application that looks up a tenant before each request, with a small pool."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from flask import Flask, g
from sqlalchemy.orm import Mapped, mapped_column

from clerkhooks import ClerkHooks, current_user, require_auth
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.store import database
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables
from tests.support import ThreadPool

CALLS = 40


@pytest.mark.parametrize(("theirs", "ours"), [(2, 5), (40, 1)])
def test_never_deadlocks(
    clerk: FakeClerk,
    postgresql_url: str,
    theirs: int,
    ours: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Concurrent calls never deadlock, because authentication has a separate pool."""
    # On a slow machine, one connection cannot serve all calls within two seconds.
    monkeypatch.setattr(database, "POOL_TIMEOUT", 30)
    app, db = Flask(__name__), make_db()

    class Tenant(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        visits: Mapped[int]

    pool = {"pool_size": theirs, "max_overflow": 0, "pool_timeout": 30}
    app.config.update(configuration(clerk, postgresql_url, SQLALCHEMY_ENGINE_OPTIONS=pool))
    app.config["DATABASE_POOL_SIZE"] = ours
    db.init_app(app)
    ClerkHooks(db).init_app(app)

    @app.before_request
    def find_tenant() -> None:
        g.tenant = db.session.get(Tenant, 1)

    @app.get("/visit")
    @require_auth
    def visit() -> str:
        db.session.execute(sa.update(Tenant).values(visits=Tenant.visits + 1))
        db.session.commit()
        return current_user.id

    with tables(app):
        with app.app_context():
            db.session.add(Tenant(id=1, visits=0))
            db.session.commit()
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        users = [clerk_id("user") for _ in range(CALLS)]

        def call(user_id: str) -> tuple[int, str]:
            response = service.client(user_id).get("/visit")
            return response.status_code, response.text

        with ThreadPool(CALLS) as threads:
            answers = list(threads.map(call, users, timeout=60))
        assert answers == [(200, user_id) for user_id in users]
        with app.app_context():
            assert db.session.get_one(Tenant, 1).visits == CALLS
