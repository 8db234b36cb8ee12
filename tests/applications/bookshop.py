"""A bookshop with its own models and migrations, in a database shared with other programs."""

from __future__ import annotations

import os

import sqlalchemy as sa
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from clerkhooks import ClerkHooks, ClerkUser, from_clerk, require_auth


class Base(DeclarativeBase):
    """The declarative base, as in Flask-SQLAlchemy's documentation."""


db = SQLAlchemy(model_class=Base)


class User(ClerkUser, db.Model):  # type: ignore[name-defined, misc]
    """A customer."""

    plan: Mapped[str] = mapped_column(server_default="free")
    phone: Mapped[str | None] = from_clerk("primary_phone_number")
    preferences: Mapped[dict[str, object] | None] = from_clerk("public_metadata", sa.JSON)
    orders: Mapped[list[Order]] = relationship(back_populates="user")


class Order(db.Model):  # type: ignore[name-defined, misc]
    """A customer's order."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id"), index=True)
    user: Mapped[User] = relationship(back_populates="orders")


hooks = ClerkHooks(db, User)
migrate = Migrate(include_name=hooks.include_name)


def create_app() -> Flask:
    """Create the application, configured by environment variables."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    migrate.init_app(app, db)
    hooks.init_app(app)

    @app.post("/orders")
    @require_auth
    def order() -> dict[str, object]:
        user = db.session.get_one(User, hooks.current_user.id)
        user.orders.append(Order(title="Notes by the Translator"))
        db.session.commit()
        return {"plan": hooks.current_user.plan, "orders": [one.title for one in user.orders]}

    return app
