"""Per-application and per-request state."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from flask import Flask, current_app, request
from werkzeug.utils import cached_property  # functools' own acquires a lock in Python 3.11

from clerkhooks.clerk.session_tokens import Session, SessionVerifier
from clerkhooks.clerk.signatures import SigningSecret
from clerkhooks.deliveries import Deliveries
from clerkhooks.events import Handlers
from clerkhooks.settings import Settings
from clerkhooks.store import Store
from clerkhooks.store.models import ClerkUser
from clerkhooks.users import Users

if TYPE_CHECKING:
    from clerkhooks.sync.lease import LeasedLoop
    from clerkhooks.web.metrics import Metrics

EXTENSION = "clerkhooks"
RequestLog = Literal["auto", "json", "text"]
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(frozen=True)
class Authenticator:
    """Verifies calls to an application. Without cookie names, cookies are ignored."""

    verifier: SessionVerifier
    authorized_parties: frozenset[str]
    cookie_names: tuple[str, ...]


@dataclass
class State:
    """The state of one application, in ``app.extensions["clerkhooks"]``."""

    hooks: Any
    settings: Settings
    values: Mapping[str, Any] = field(repr=False)
    """The variables from which *settings* were read, for the ``doctor`` command."""
    store: Store
    handlers: Handlers
    users: Users
    deliveries: Deliveries
    authenticator: Authenticator
    secrets: tuple[SigningSecret, ...]
    metrics: Metrics | None = None
    loops: Sequence[LeasedLoop] = ()
    """The background work of this process."""
    logs_requests: bool = False
    """Whether every request is logged, as in the service, or only deliveries."""
    log_format: RequestLog = "auto"


@dataclass
class RequestState:
    """The state of one request, in ``request.environ["clerkhooks"]``."""

    app: Flask
    fields: dict[str, Any] = field(default_factory=dict)
    """The fields of the request's log line: ids, codes and numbers, never text from a user."""
    started_at: float = field(default_factory=time.perf_counter)
    is_authenticated: bool = False
    session: Session | None = None
    user: ClerkUser | None = None

    @property
    def app_state(self) -> State:
        """The state of the application that serves this request."""
        return _get_state(self.app)

    @cached_property
    def request_id(self) -> str:
        """The caller's own request id if it is well-formed, otherwise a new one."""
        sent = request.environ.get("HTTP_X_REQUEST_ID", "")
        return sent if _SAFE_ID.fullmatch(sent) else secrets.token_hex(16)

    @property
    def seconds(self) -> float:
        """Seconds since the request started."""
        return time.perf_counter() - self.started_at


def current_state() -> State:
    """
    Return the state of the current application.

    Raises:
        RuntimeError: ``ClerkHooks.init_app`` was not called for this application.
    """
    return _get_state(current_app)


def _get_state(app: Flask) -> State:
    try:
        return cast("State", app.extensions[EXTENSION])
    except KeyError:
        raise RuntimeError(
            "clerkhooks is not set up for this application. "
            "Call hooks.init_app(app) in its factory."
        ) from None


def disconnect(app: Flask) -> None:
    """Close the database connections of *app*, for instance at the end of a test."""
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        db.session.remove()
        for engine in db.engines.values():
            engine.dispose()
    app.extensions[EXTENSION].store.database.engine.dispose()


def request_state() -> RequestState:
    """Return the state of the current request."""
    # Kept in the environ, not in g: a test may keep one application context for many requests.
    environ, app = request.environ, current_app._get_current_object()  # type: ignore[attr-defined]
    state = environ.get(EXTENSION)
    # An application may forward a request to another application, which has different users.
    if state is None or state.app is not app:
        state = environ[EXTENSION] = RequestState(app)
    return cast("RequestState", state)


def annotate(**fields: str | float | None) -> None:
    """Add fields to the log line of the current request."""
    request_state().fields.update(fields)
