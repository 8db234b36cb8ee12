"""gunicorn's configuration: ``gunicorn --config python:clerkhooks.serving wsgi:app``."""

from __future__ import annotations

from typing import Any

from clerkhooks import models
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


def post_fork(server: Any, _worker: Any) -> None:
    """Give each worker connections of its own: two processes on one socket would read each other's answers."""
    models.discard_connections(server.app.wsgi())
