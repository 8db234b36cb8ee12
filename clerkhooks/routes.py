"""The names of the routes, and the blueprint that contains them."""

from __future__ import annotations

from collections.abc import Iterable

from flask import Blueprint, Flask

from clerkhooks.web import changes, health, me, webhooks
from clerkhooks.web.state import EXTENSION, State

ROUTES = ("webhooks", "me", "health", "metrics", "console", "changes")
DEFAULT_ROUTES = ("webhooks", "me")


def parse_routes(routes: Iterable[str]) -> frozenset[str]:
    """
    Return the set of *routes*.

    Raises:
        ValueError: a name is unknown.
    """
    if isinstance(routes, str):
        raise ValueError(f"routes must be a tuple of names, such as ({routes!r},).")
    wanted = frozenset(routes)
    if unknown := wanted.difference(ROUTES):
        raise ValueError(f"Unknown routes: {', '.join(sorted(unknown))}. Use {', '.join(ROUTES)}.")
    return wanted


def make_blueprint(app: Flask, state: State, wanted: frozenset[str]) -> Blueprint:
    """Return the blueprint with the *wanted* routes. Some also need a variable."""
    blueprint, settings = Blueprint(EXTENSION, __name__), state.settings
    if "webhooks" in wanted:
        webhooks.add_routes(blueprint)
    if "me" in wanted:
        me.add_routes(blueprint, app, settings.authorized_parties)
    if "health" in wanted:
        health.add_routes(blueprint)
    if "metrics" in wanted and settings.metrics_token is not None:
        from clerkhooks.web.metrics import init_metrics  # also imports prometheus-client

        init_metrics(state)
        health.add_metrics(blueprint)
    if "changes" in wanted and settings.changes_token is not None:
        changes.add_route(blueprint)
    if "console" in wanted and settings.console_password is not None:
        from clerkhooks.console import make_console

        blueprint.register_blueprint(make_console())
    return blueprint
