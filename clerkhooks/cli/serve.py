"""``clerkhooks serve``: migrate the database if requested, and start gunicorn."""

from __future__ import annotations

import os
import sys

import click

from clerkhooks.settings import PROJECT, ServiceSettings, exit_if_invalid, read_environ


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--migrate", is_flag=True, help="Migrate the database first.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(migrate: bool, arguments: tuple[str, ...]) -> None:
    """
    Check the settings, then run `gunicorn wsgi:app`.

    --migrate is for platforms without a release step. If several hosts start at once, one migrates
    and the others wait. ARGUMENTS are passed to gunicorn.
    """
    if not (PROJECT / "wsgi.py").exists():
        raise click.ClickException("serve needs a checkout of the service: wsgi.py is missing.")
    os.chdir(PROJECT)
    with exit_if_invalid():
        settings = ServiceSettings.from_mapping(read_environ())
    # gunicorn parses this variable on import, and exits with a traceback if it is empty or invalid.
    os.environ["WEB_CONCURRENCY"] = str(settings.web_concurrency)
    if migrate:
        _migrate()
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "wsgi:app", *arguments])  # noqa: S606


def _migrate() -> None:
    from flask_migrate import upgrade

    from clerkhooks import create_app
    from clerkhooks.cli.options import database_failures
    from clerkhooks.web.state import disconnect

    app = create_app()
    with app.app_context(), database_failures():
        upgrade()
    disconnect(app)
