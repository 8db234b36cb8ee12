"""Keep a users table in sync with Clerk, and authenticate calls with session tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clerkhooks.errors import SettingsError
    from clerkhooks.events import Event, Outcome
    from clerkhooks.extension import ClerkHooks
    from clerkhooks.service import create_app
    from clerkhooks.store.memberships import Membership
    from clerkhooks.store.models import ClerkOrganization, ClerkUser, Versioned, from_clerk
    from clerkhooks.versioned import upsert
    from clerkhooks.web.auth import current_session, current_user, require_auth

__all__ = [
    "ClerkHooks",
    "ClerkOrganization",
    "ClerkUser",
    "Event",
    "Membership",
    "Outcome",
    "SettingsError",
    "Versioned",
    "create_app",
    "current_session",
    "current_user",
    "from_clerk",
    "require_auth",
    "upsert",
]
_MODULES = {
    "ClerkHooks": "extension",
    "ClerkOrganization": "store.models",
    "ClerkUser": "store.models",
    "Event": "events",
    "Membership": "store.memberships",
    "Outcome": "events",
    "SettingsError": "errors",
    "Versioned": "store.models",
    "create_app": "service",
    "current_session": "web.auth",
    "current_user": "web.auth",
    "from_clerk": "store.models",
    "require_auth": "web.auth",
    "upsert": "versioned",
}


def __getattr__(name: str) -> Any:
    # Modules are imported on first use (PEP 562). gunicorn.conf.py can therefore read the settings
    # without importing Flask or the database driver.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
