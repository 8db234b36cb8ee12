"""An application with async views."""

from __future__ import annotations

import asyncio

import pytest
from flask import Blueprint, Flask, g
from flask.views import MethodView

from clerkhooks import ClerkHooks, Event, current_user, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables


def test_protects_async_views(clerk: FakeClerk, url: str) -> None:
    """The user is available in coroutines, including coroutines in a protected blueprint."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    hooks = ClerkHooks(db)
    hooks.init_app(app)
    blueprint = Blueprint("guarded", __name__, url_prefix="/guarded")
    blueprint.before_request(require_auth())

    @app.get("/hello")
    @require_auth
    async def hello() -> str:
        await asyncio.sleep(0)
        return current_user.name

    @blueprint.get("/hello")
    async def guarded_hello() -> str:
        await asyncio.sleep(0)
        return current_user.name

    @app.get("/welcome")
    @require_auth(optional=True)
    async def welcome() -> str:
        await asyncio.sleep(0)
        return hooks.optional_user.name if hooks.optional_user else "nobody"

    @app.get("/admins")
    @require_auth(role="org:admin")
    async def admins() -> list[str]:
        async def read() -> str:
            await asyncio.sleep(0)
            return hooks.current_user.name

        return list(await asyncio.gather(read(), read()))

    class Profile(MethodView):
        @require_auth
        async def get(self, number: int) -> str:
            await asyncio.sleep(0)
            return f"{current_user.name} {number}"

    app.add_url_rule("/profile/<int:number>", view_func=Profile.as_view("profile"))
    app.register_blueprint(blueprint)

    @app.before_request
    async def look_up() -> None:
        await asyncio.sleep(0)
        g.users = db.session.query(hooks.model).count()

    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up(first_name="Ada", last_name="Lovelace"))
        for path in ("/hello", "/guarded/hello"):
            assert ada.get(path).text == "Ada Lovelace"
            assert service.http.get(path).status_code == 401
        assert ada.get("/profile/7").text == "Ada Lovelace 7"
        assert service.http.get("/profile/7").status_code == 401
        assert ada.get("/welcome").text == "Ada Lovelace"
        assert service.http.get("/welcome").text == "nobody"
        assert ada.get("/admins").status_code == 403
        admin = service.client(service.sign_up(first_name="Grace"), role="org:admin")
        assert admin.get("/admins").get_json() == ["Grace Lovelace"] * 2


def test_raises_from_async_views(clerk: FakeClerk, sqlite_url: str) -> None:
    """An exception in an async view gives Flask's 500 page, or is raised in testing mode."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)

    @app.get("/bug")
    @require_auth
    async def bug() -> str:
        raise LookupError("a bug")

    with tables(app):
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        assert (ada.get("/bug").status_code, ada.get("/bug").mimetype) == (500, "text/html")
        app.testing = True
        with pytest.raises(LookupError, match="a bug"):
            ada.get("/bug")


def test_refuses_async_handlers(clerk: FakeClerk) -> None:
    """An async handler is refused, because it would not be awaited in the transaction."""

    async def handler(event: Event) -> None:
        """Never awaited."""

    with pytest.raises(TypeError, match="plain function"):
        ClerkHooks(make_db()).on("user.created")(handler)
