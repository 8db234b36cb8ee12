"""A back office for the users table, with Flask-Admin."""

from __future__ import annotations

from flask import Flask
from flask_admin import Admin
from flask_admin.contrib.sqla import ModelView
from sqlalchemy.orm import Mapped

from clerkhooks import ClerkHooks, ClerkUser, from_clerk
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables


class People(ModelView):  # type: ignore[misc]  # untyped
    """Shows Clerk's columns and allows editing of the application's notes."""

    can_create = False
    can_delete = False
    can_view_details = True
    column_searchable_list = ("name", "email")
    form_columns = ("note",)


def test_lists_and_edits_users(clerk: FakeClerk, sqlite_url: str) -> None:
    """The model works like any other, and webhooks do not change the application's column."""
    app, db = Flask(__name__), make_db()

    class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
        username: Mapped[str | None] = from_clerk("username")
        note: Mapped[str | None]

    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db, User).init_app(app)
    admin = Admin(app, name="Office")
    admin.add_view(People(User, db))
    admin.add_view(ModelView(User, db, name="All", endpoint="all"))
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        user_id = service.sign_up(first_name="Ada", last_name="Lovelace", username="ada")
        page = service.http.get("/admin/user/").text
        assert "Ada Lovelace" in page
        assert "Ada Lovelace" in service.http.get(f"/admin/user/details/?id={user_id}").text
        assert "Ada Lovelace" in service.http.get(f"/admin/all/edit/?id={user_id}").text
        edit = f"/admin/user/edit/?id={user_id}"
        assert 'name="note"' in service.http.get(edit).text
        assert service.http.post(edit, data={"note": "VIP"}).status_code == 302
        service.sign_up(id=user_id, first_name="Ada", last_name="King", username="king")
        with app.app_context():
            user = db.session.get_one(User, user_id)
            assert (user.name, user.username, user.note) == ("Ada King", "king", "VIP")
