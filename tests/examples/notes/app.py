"""Users write notes, and an organization's admins may delete any note of the organization."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Blueprint, Flask, abort, request
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks import ClerkHooks, ClerkUser, current_session, from_clerk, require_auth


class Base(DeclarativeBase):
    """The application's declarative base."""


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base  # db.Model as a type checker sees it
else:
    Model = db.Model


class User(ClerkUser, Model):
    """A Clerk user, with an additional field from Clerk and a column of the application."""

    username: Mapped[str | None] = from_clerk("username")
    plan: Mapped[str] = mapped_column(server_default="free")


class Note(Model):
    """A user's note, with the organization that was active when the note was written."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey(User.id), index=True)
    organization_id: Mapped[str | None]
    text: Mapped[str]


hooks = ClerkHooks(db, User)
notes = Blueprint("notes", __name__, url_prefix="/notes")


@notes.get("/")
@require_auth
def list_notes() -> list[dict[str, object]]:
    """Return the caller's own notes."""
    own = sa.select(Note).where(Note.user_id == hooks.current_user.id).order_by(Note.id)
    return [{"id": note.id, "text": note.text} for note in db.session.scalars(own)]


@notes.post("/")
@require_auth
def add_note() -> tuple[dict[str, object], int]:
    """Add a note. The caller's row exists, even if the call came before the webhook."""
    body = request.get_json()
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        abort(400)
    user_id, organization_id = hooks.current_user.id, active_organization()
    note = Note(user_id=user_id, organization_id=organization_id, text=body["text"])
    db.session.add(note)
    db.session.commit()
    return {"id": note.id, "text": note.text}, 201


@notes.delete("/<int:number>")
@require_auth(role="org:admin")
def delete_note(number: int) -> tuple[str, int]:
    """Delete any note of the organization in which the caller is an admin."""
    own = Note.organization_id == active_organization()
    note = db.one_or_404(sa.select(Note).where(Note.id == number, own))
    db.session.delete(note)
    db.session.commit()
    return "", 204


@notes.get("/welcome")
@require_auth(optional=True)
def welcome() -> dict[str, str]:
    """Greet the caller, who may be anonymous."""
    user = hooks.optional_user
    return {"greeting": f"Hello {user.username or user.name}!" if user else "Please sign in."}


def active_organization() -> str | None:
    """Return the id of the caller's active organization, or None."""
    return current_session.organization.id if current_session.organization else None


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Create the application."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.config.update(config or {})
    db.init_app(app)
    hooks.init_app(app)
    Migrate(app, db, include_name=hooks.include_name)
    app.register_blueprint(notes)
    return app
