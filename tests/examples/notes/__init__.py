"""Notes: everyone keeps their own, an organization's admins delete any of its notes, and there is a page for all."""

import sqlalchemy as sa
from flask import Blueprint, abort, request
from sqlalchemy.orm import Mapped, mapped_column

from clerkhooks import current_session, current_user, require_auth
from clerkhooks.models import Model, User, db

blueprint = Blueprint("notes", __name__, url_prefix="/api/notes")


class Note(Model):
    """What a user wrote down, in the organization that was active then."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey(User.id), index=True)
    organization_id: Mapped[str | None]
    text: Mapped[str]


@blueprint.get("/")
@require_auth
def list_notes() -> list[dict[str, object]]:
    """The caller's own notes."""
    notes = db.session.scalars(sa.select(Note).where(Note.user_id == current_user.id).order_by(Note.id))
    return [{"id": note.id, "text": note.text} for note in notes]


@blueprint.post("/")
@require_auth
def add_note() -> tuple[dict[str, object], int]:
    """A new note of the caller's. Their row in users exists, also when they are faster than their webhook."""
    body = request.get_json()
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        abort(400)
    note = Note(user_id=current_user.id, organization_id=active_organization(), text=body["text"])
    db.session.add(note)
    db.session.commit()
    return {"id": note.id, "text": note.text}, 201


@blueprint.delete("/<int:number>")
@require_auth(role="org:admin")
def delete_note(number: int) -> tuple[str, int]:
    """Any note of the organization whose admin calls. Whoever founds an organization is an admin, but only there."""
    note = db.one_or_404(sa.select(Note).where(Note.id == number, Note.organization_id == active_organization()))
    db.session.delete(note)
    db.session.commit()
    return "", 204


@blueprint.get("/welcome")
@require_auth(optional=True)
def welcome() -> dict[str, str]:
    """A page for everyone, which greets those who are signed in."""
    return {"greeting": f"Hello {current_user.name}!" if current_user else "Hello! Please sign in."}


def active_organization() -> str | None:
    """The id of the organization that the caller works in, if any."""
    return current_session.organization.id if current_session.organization else None
