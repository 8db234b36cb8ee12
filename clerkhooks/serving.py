"""
gunicorn's configuration, and how to start it: ``python -m clerkhooks.serving``.

Also ``gunicorn --config python:clerkhooks.serving wsgi:app`` works, but gunicorn then reads WEB_CONCURRENCY from the
environment by itself and before all else, so that a wrong one ends in its own words.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from typing import Any

from clerkhooks.errors import SettingsError
from clerkhooks.settings import load_dotenv_file, load_settings, names_postgresql

with suppress(SettingsError):  # which is told below
    load_dotenv_file()
_on_gevent = names_postgresql(os.environ)
if _on_gevent:
    import gevent.monkey

    # Before anything is imported that waits: from here on whoever waits for a network lets the others go on.
    gevent.monkey.patch_all()

from clerkhooks import auth, coroutines, models  # noqa: E402
from clerkhooks.logs import logger  # noqa: E402


def _leave_nothing_behind(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a worker, which inherits this
        shutil.rmtree(directory, ignore_errors=True)


ASYNC_VIEWS = 64  # that run at a time in a worker on gevent

_settings = load_settings()  # a wrong variable ends the server here, before anything listens
# Only as gunicorn's configuration: what is run by name is another copy of this module.
_metrics = tempfile.mkdtemp(prefix="clerkhooks-metrics-") if _settings.metrics_token and __name__ != "__main__" else None
if _metrics:
    # Before the application is loaded, for prometheus-client looks once; and a new one for each boot: counts start at zero.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics
    # gunicorn's on_exit would not be called where it cannot listen.
    atexit.register(_leave_nothing_behind, _metrics, os.getpid())

bind = f"0.0.0.0:{_settings.port}"
workers = _settings.web_concurrency
# SQLite waits for its file inside the library, where nobody else could go on meanwhile: it is given threads.
worker_class = "gevent" if _on_gevent else "gthread"
threads = models.THREADS
worker_connections = 500  # with gevent; with the threads of async views, which take some five descriptors each, below the usual 1,024
preload_app = True
keepalive = 75  # seconds: longer than the usual proxy keeps a connection, so that it never writes into a closed one
timeout = 15  # seconds without a heartbeat; Svix gives up on an answer after as many
graceful_timeout = 12  # seconds: a request is over within 10; with gevent, idle connections are waited for as well
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
    if _metrics:
        app.extensions["clerkhooks.metrics"].begin_process(app)
    if _on_gevent:
        app.async_to_sync = coroutines.make_async_to_sync(ASYNC_VIEWS)
    auth.fetch_keys_soon(app)


if _on_gevent:

    def pre_request(_worker: Any, request: Any) -> None:
        """Remember which round of the loop this request began in."""
        request.began_in = gevent.get_hub().loop.iteration

    def post_request(_worker: Any, request: Any, _environ: Any, _response: Any) -> None:
        """
        Let the loop look at other connections after a request that waited for nothing, such as one that is refused.

        Else one that always has the next request at hand, and never waits for a database, would keep the worker for itself.
        """
        if gevent.get_hub().loop.iteration == request.began_in:
            gevent.sleep(0.00001)  # a round: a sleep of none would be over before it


def child_exit(_server: Any, worker: Any) -> None:
    """Forget the gauges of a worker that is gone; what it counted stays."""
    if _metrics:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def main() -> None:
    """Run gunicorn with this configuration; further arguments are gunicorn's."""
    # gunicorn reads it when it is imported, and cannot bear an empty one.
    os.environ["WEB_CONCURRENCY"] = str(_settings.web_concurrency)
    from gunicorn.app.wsgiapp import run

    sys.argv = ["gunicorn", "--config", "python:clerkhooks.serving", *sys.argv[1:], "wsgi:app"]
    run()


if __name__ == "__main__":
    main()
