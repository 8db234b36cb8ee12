"""Wiring, and nothing else."""

from __future__ import annotations

from typing import cast

from flask import Flask
from flask.json.provider import DefaultJSONProvider

from clerkhooks import models, ops, webhooks
from clerkhooks import users as users_service
from clerkhooks.api import init_api
from clerkhooks.auth import init_auth
from clerkhooks.cli.users import users
from clerkhooks.cli.webhooks import webhooks as webhooks_group
from clerkhooks.logs import init_logs
from clerkhooks.problems import init_problems
from clerkhooks.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> Flask:
    """
    The service, configured by *settings*, or by the environment and .env where none are given.

    Raises:
        SystemExit: with status 2 and one message, if the environment cannot work.
    """
    settings = settings or load_settings()
    app = Flask("clerkhooks")
    app.extensions["clerkhooks.settings"] = settings
    cast("DefaultJSONProvider", app.json).sort_keys = False
    app.url_map.strict_slashes = False  # Svix counts a redirect as a failure
    app.url_map.merge_slashes = False
    init_logs(app, settings.log_format)
    init_problems(app)
    models.init_database(app, settings.database_url)
    users_service.init_users(app)
    webhooks.init_webhooks(app, settings)
    init_auth(app, settings)
    init_api(app, settings)
    ops.init_ops(app, settings)
    if settings.console_password is not None:
        from clerkhooks.console import init_console  # nobody else pays for loading it

        init_console(app, settings, settings.console_password)
    app.cli.add_command(webhooks_group)
    app.cli.add_command(users)
    return app
