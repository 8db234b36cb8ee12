"""``POST /webhooks/clerk`` receives Clerk's events."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from clerkhooks.clerk.events import parse_event
from clerkhooks.clerk.signatures import HEADERS, verify_signature
from clerkhooks.errors import RequestError, SignatureError
from clerkhooks.store.pool import Overloaded
from clerkhooks.web.logs import log_delivery, log_failure
from clerkhooks.web.problems import answered, json_response, problem, read_body
from clerkhooks.web.state import State, current_state, request_state

_IN_ENVIRON = {name: f"HTTP_{name.upper().replace('-', '_')}" for name in HEADERS}


def add_routes(blueprint: Blueprint) -> None:
    """Add the route, with and without a trailing slash: Svix counts a redirect as a failure."""
    blueprint.add_url_rule(
        "/webhooks/clerk",
        view_func=receive_webhook,
        methods=["POST"],
        strict_slashes=False,
        provide_automatic_options=False,
    )


def receive_webhook() -> Response:
    """Respond to one delivery, then count and log it."""
    delivery, state = request_state(), current_state()
    response = apply_delivery(delivery.fields, state)
    if state.metrics is not None:
        state.metrics.count_delivery(response.status_code, delivery.fields, delivery.seconds)
    if not state.logs_requests:
        log_delivery(delivery.fields)
    return response


@answered
def apply_delivery(fields: dict[str, Any], state: State) -> Response:
    """Verify, parse and apply the current request's delivery; add log fields to *fields*."""
    now = time.time()
    body = read_body(unreadable=SignatureError)  # an unreadable body cannot be verified
    environ = request.environ
    headers = {name: environ.get(key, "") for name, key in _IN_ENVIRON.items()}
    message = verify_signature(headers, body, state.secrets, now)
    fields["message_id"] = message.message_id
    event = parse_event(message, state.store.stored_types)
    fields |= {"message_id": event.message_id, "event_type": event.type, "user_id": event.user_id}
    try:
        outcome = state.deliveries.apply(event)
    except Overloaded:
        raise
    except (RequestError, HTTPException) as error:
        # Raised by a handler, for instance by abort(404). Clerk must not receive that status.
        log_failure(error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error")
    lag = time.time() - event.occurred_at.timestamp() if event.occurred_at else None
    fields |= {"outcome": outcome, "lag_s": None if lag is None else round(lag, 3)}
    return json_response({"outcome": outcome, "messageId": message.message_id})
