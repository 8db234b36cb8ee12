"""gunicorn's configuration, read from the directory in which gunicorn starts."""

from __future__ import annotations

import gevent.monkey

# Monkey-patch before anything that does I/O is imported. For example, psycopg decides at import
# time how it waits for I/O.
gevent.monkey.patch_all()

import atexit  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from clerkhooks.settings import ServiceSettings, exit_if_invalid, read_environ  # noqa: E402
from clerkhooks.web.worker import raise_descriptor_limit  # noqa: E402

with exit_if_invalid():  # check the settings before gunicorn listens
    settings = ServiceSettings.from_mapping(read_environ())

bind = f"0.0.0.0:{settings.port}"
workers = settings.web_concurrency
worker_class = "clerkhooks.web.worker.Worker"
# The limit for each worker; a connection takes about 20 KB. The remaining descriptors are for the
# database, signing keys and files.
worker_connections = min(8000, int(0.8 * raise_descriptor_limit()))
backlog = 4096
preload_app = True
# In seconds. Most proxies close idle connections earlier, so they do not reuse a connection that
# gunicorn has closed.
keepalive = 75
timeout = 15  # seconds without a heartbeat before a worker is killed; Svix's timeout is also 15
graceful_timeout = 12  # seconds; a request takes at most 10
limit_request_line = 8190
limit_request_field_size = 32768  # the application handles tokens of up to 16 KiB
control_socket_disable = True


def _remove_metrics(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # forked workers inherit the exit handler but must not run it
        shutil.rmtree(directory, ignore_errors=True)


if settings.metrics_token:
    # prometheus-client reads the variable when it is imported. Each start gets a new directory, so
    # that counters start at zero.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics = tempfile.mkdtemp(
        prefix="clerkhooks-metrics-"
    )
    # Do not use the hook on_exit: gunicorn does not call it if the port is already in use.
    atexit.register(_remove_metrics, _metrics, os.getpid())


def on_starting(_server: Any) -> None:
    """Warn once if no source of session keys is configured."""
    if not (settings.jwt_keys or settings.jwks_url or settings.secret_key):
        from clerkhooks.web.logs import logger

        remedy = (
            "Set CLERK_JWT_KEY or CLERK_PUBLISHABLE_KEY. Until then, protected routes return 503."
        )
        logger.warning("keys_not_configured", extra={"remedy": remedy})


def when_ready(_server: Any) -> None:
    """
    Before the first worker is forked, exempt all existing objects from garbage collection.

    A collection in a worker would write to these objects, and so copy memory that workers share.
    """
    gc.collect()
    gc.freeze()
    # Otherwise, objects that refer to gevent would outlive it when the interpreter exits.
    atexit.register(gc.unfreeze)


def post_fork(server: Any, _worker: Any) -> None:
    """Record the limit on database connections, and start fetching the signing keys."""
    from clerkhooks.web.auth import fetch_keys_soon

    app = server.app.wsgi()
    if settings.metrics_token:
        app.extensions["clerkhooks"].metrics.begin_process()
    fetch_keys_soon(app)


def post_worker_init(worker: Any) -> None:
    """Start the background work. In post_fork, it would delay the worker's signal handlers."""
    from clerkhooks.web.background import start_background

    start_background(worker.app.wsgi())


def worker_exit(server: Any, _worker: Any) -> None:
    """Let another worker continue the background work."""
    from clerkhooks.web.background import stop_background

    stop_background(server.app.wsgi())


def pre_request(_worker: Any, request: Any) -> None:
    """Record the iteration of the event loop in which this request began."""
    request.began_in = gevent.get_hub().loop.iteration


def post_request(_worker: Any, request: Any, _environ: Any, _response: Any) -> None:
    """
    Yield to other connections after a request that never waited, such as a rejected one.

    Otherwise, a client that sends each request immediately after the previous one would monopolize
    the worker.
    """
    if gevent.get_hub().loop.iteration == request.began_in:
        gevent.sleep(0.00001)  # waits for the next iteration; sleep(0) does not


def child_exit(_server: Any, worker: Any) -> None:
    """Remove the gauges of a worker that has exited, but keep its counters."""
    if settings.metrics_token:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
