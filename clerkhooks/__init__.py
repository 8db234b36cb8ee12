"""A users table that is always what Clerk says: webhooks in, verified sessions for your own routes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clerkhooks.app import create_app
    from clerkhooks.auth import current_session, current_user, require_auth

__all__ = ["create_app", "current_session", "current_user", "require_auth"]
_ROOMS = {"create_app": "app", "current_session": "auth", "current_user": "auth", "require_auth": "auth"}


def __getattr__(name: str) -> Any:
    # Found when asked for: the server has something to do before what waits for a network is imported (PEP 562).
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
