"""
gunicorn's configuration, and how to start it: ``python -m clerkhooks.serving``.

Also ``gunicorn --config python:clerkhooks.serving wsgi:app`` works, but gunicorn then reads WEB_CONCURRENCY from the
environment by itself and before all else, so that a wrong one ends in its own words.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from clerkhooks import auth, models
from clerkhooks.logs import logger
from clerkhooks.settings import load_settings

_settings = load_settings()  # a wrong variable ends the server here, before anything listens

bind = f"0.0.0.0:{_settings.port}"
workers = _settings.web_concurrency
worker_class = "gthread"
threads = models.THREADS
preload_app = True
keepalive = 75  # seconds: longer than the usual proxy keeps a connection, so that it never writes into a closed one
timeout = 15  # seconds without a heartbeat; Svix gives up on an answer after as many
graceful_timeout = 25  # seconds: platforms kill after 30
limit_request_line = 8190
limit_request_field_size = 32768  # headers of 16 KiB reach the application, which answers in its own words
control_socket_disable = True


def on_starting(_server: Any) -> None:
    """Say once what will not work."""
    if not (_settings.jwt_keys or _settings.jwks_url or _settings.secret_key):
        logger.warning(
            "keys_not_configured", extra={"remedy": "Set CLERK_JWT_KEY or CLERK_PUBLISHABLE_KEY; until then protected routes answer 503."}
        )


def post_fork(server: Any, _worker: Any) -> None:
    """Give each worker connections and keys of its own: two processes on one socket would read each other's answers."""
    app = server.app.wsgi()
    models.discard_connections(app)
    auth.fetch_keys_soon(app)


def main() -> None:
    """Run gunicorn with this configuration; further arguments are gunicorn's."""
    # gunicorn reads it when it is imported, and cannot bear an empty one.
    os.environ["WEB_CONCURRENCY"] = str(_settings.web_concurrency)
    from gunicorn.app.wsgiapp import run

    sys.argv = ["gunicorn", "--config", "python:clerkhooks.serving", *sys.argv[1:], "wsgi:app"]
    run()


if __name__ == "__main__":
    main()
