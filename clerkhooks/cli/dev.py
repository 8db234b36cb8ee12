"""``clerkhooks dev``: try the service on this machine, without a Clerk account."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli.demonstration import Demonstration
from clerkhooks.cli.options import CannotDo, mark
from clerkhooks.web.logs import logger
from clerkhooks.web.state import disconnect

HOST = "127.0.0.1"
TOKEN_LIFETIME = 3600  # seconds
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option(
    "--once",
    is_flag=True,
    help="Exit after the demonstration, with status 0 only if every check passed.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on, on the loopback interface only. 0 chooses a free one.",
)
@click.pass_context
def dev(context: click.Context, once: bool, port: int) -> None:
    """
    Try the service on this machine: no Clerk account, settings or database server needed.

    Starts the service with a temporary SQLite database and newly generated keys, sends it signed
    webhooks and API calls, and shows the results. Then it keeps serving until you press Ctrl-C,
    and deletes the database.

    Your environment variables, .env file and database are not used.

    Exit status: 0 on success, 1 if a check failed, 2 if the port cannot be used.
    """
    context.exit(run(port, once=once))


def run(port: int, *, once: bool) -> int:
    """
    Start the service, show the demonstration and, unless *once*, serve until a signal.

    Returns the exit status.

    Raises:
        CannotDo: *port* cannot be used.
    """
    clerk, password = FakeClerk(), secrets.token_hex(8)
    with (
        _signals_interrupt(),
        _listen(port) as listener,
        TemporaryDirectory(prefix="clerkhooks-dev-") as folder,
    ):
        database = Path(folder, "clerkhooks.db")
        click.secho(
            "clerkhooks dev: the service, with new keys and a temporary database", bold=True
        )
        with _running_app(clerk, database, password) as app, _serving(app, listener) as url:
            _report("database", str(database))
            _report("server", url)
            demonstration = Demonstration(clerk, url)
            ok = _demonstrate(demonstration, database)
            if not once:
                _wait(demonstration, url, password)
    return 0 if ok else 1


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for every signal that asks the process to end."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        # nohup ignores SIGHUP on purpose. A shell ignores SIGINT for all background jobs.
        if number != signal.SIGHUP or handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            raise CannotDo(
                f"Cannot listen on port {port}: {error.strerror}.\n"
                f"Choose another port: clerkhooks dev --port {port % 65535 + 1}"
            ) from None
        yield listener


@contextmanager
def _running_app(clerk: FakeClerk, database: Path, password: str) -> Iterator[Flask]:
    """Create the service with its tables; it reads neither the environment nor ``.env``."""
    from clerkhooks import create_app

    own = {"DATABASE_URL": f"sqlite:///{database}", "CONSOLE_PASSWORD": password}
    app = create_app(clerk.environ | own)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    try:
        yield app
    finally:
        disconnect(app)


class _RequestHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing: the service logs each request itself."""


@contextmanager
def _serving(app: Flask, listener: socket.socket) -> Iterator[str]:
    """Serve *app* in a thread until the block ends; yield the base URL."""
    port, fd = listener.getsockname()[1], listener.fileno()
    server = make_server(HOST, port, app, threaded=True, request_handler=_RequestHandler, fd=fd)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{port}"
    finally:
        server.shutdown()
        thread.join()


def _demonstrate(demonstration: Demonstration, database: Path) -> bool:
    """Run *demonstration* with the service's log limited to errors; return whether it passed."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return demonstration.run(database)
    finally:
        logger.setLevel(level)


def _wait(demonstration: Demonstration, url: str, password: str) -> None:
    """Print how to continue, and wait for a signal."""
    token = demonstration.clerk.session_token(demonstration.ada, lifetime=TOKEN_LIFETIME)
    until = time.strftime("%H:%M", time.localtime(time.time() + TOKEN_LIFETIME))
    try:
        click.secho(f"\nServing on {url}. Press Ctrl-C to stop.", bold=True)
        click.echo(f"Call the API as Ada (her token expires at {until}):\n")
        click.echo(f"  curl -H 'Authorization: Bearer {token}' {url}/api/me\n")
        click.echo(f"Open the console: {url}/console, any user name, password {password}\n")
        click.echo(
            'To connect your own Clerk application, follow "Set up the service" in README.md.\n'
        )
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("\nStopping.")


def _report(subject: str, text: str) -> None:
    click.echo(f"  {click.style(mark(True), fg='green')} {subject:<10}{text}")
