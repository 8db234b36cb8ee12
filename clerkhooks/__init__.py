"""A users table that is always what Clerk says: webhooks in, verified sessions for your own routes out."""

from clerkhooks.app import create_app
from clerkhooks.auth import current_session, current_user, require_auth

__all__ = ["create_app", "current_session", "current_user", "require_auth"]
