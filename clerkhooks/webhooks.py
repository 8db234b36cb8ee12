"""``POST /webhooks/clerk``: where Clerk's events come in."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flask import Blueprint, Flask, current_app, request
from werkzeug.exceptions import BadRequest

from clerkhooks import logs, users
from clerkhooks.clerk.events import UserEvent, parse_event
from clerkhooks.clerk.signatures import HEADERS, SigningSecret, verify_signature
from clerkhooks.errors import SignatureError
from clerkhooks.settings import Settings

blueprint = Blueprint("webhooks", __name__)


def init_webhooks(app: Flask, settings: Settings) -> None:
    """Register the route on *app*, ready to verify with every secret of *settings*."""
    app.extensions["clerkhooks.secrets"] = tuple(SigningSecret(raw) for raw in settings.webhook_secrets)
    app.register_blueprint(blueprint)


@blueprint.post("/webhooks/clerk", provide_automatic_options=False)
def receive_webhook() -> Mapping[str, str]:
    """Verify, parse and apply one delivery. What it raises, ``problems`` answers."""
    headers = {name: request.headers.get(name, "") for name in HEADERS}
    message = verify_signature(headers, _read_body(), current_app.extensions["clerkhooks.secrets"], time.time())
    logs.annotate(message_id=message.message_id)
    event = parse_event(message)
    logs.annotate(message_id=event.message_id, event_type=event.type, user_id=event.user_id if isinstance(event, UserEvent) else None)
    outcome = users.receive(event)
    lag = None if event.occurred_at is None else round(time.time() - event.occurred_at.timestamp(), 3)
    logs.annotate(outcome=outcome, lag_s=lag)
    return {"outcome": outcome, "messageId": message.message_id}


def _read_body() -> bytes:
    try:
        return request.get_data(cache=False)
    except BadRequest:
        raise SignatureError("body_unreadable") from None
