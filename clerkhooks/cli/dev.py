"""``clerkhooks dev``: try the service on this machine, without a Clerk account."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from flask import Flask
from werkzeug.serving import make_server

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli.demonstration import Demonstration
from clerkhooks.cli.options import CannotDo, mark
from clerkhooks.web.state import disconnect

HOST = "127.0.0.1"
TOKEN_LIFETIME = 3600  # seconds


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
    help="The port on the loopback interface. 0 chooses a free port.",
)
@click.pass_context
def dev(context: click.Context, once: bool, port: int) -> None:
    """
    Try the service on this machine. You need no Clerk account, settings or database server.

    This command creates the service with a temporary SQLite database and new keys. It sends signed
    webhooks and API calls to the service and shows the results. The service then runs until you
    press Ctrl-C. The database is deleted at the end.

    Your environment variables, .env file and database are not used.

    Exit status: 0 on success, 1 if a check failed, 2 if the port cannot be used.
    """
    context.exit(0 if run(port, once=once) else 1)


def run(port: int, *, once: bool) -> bool:
    """
    Run the demonstration and, unless *once* is true, serve until a signal arrives.

    Return whether every check passed.

    Raises:
        CannotDo: *port* cannot be used.
    """
    _interrupt_on_signals()
    clerk, password = FakeClerk(), secrets.token_hex(8)
    with _listen(port) as listener, TemporaryDirectory(prefix="clerkhooks-dev-") as folder:
        database = Path(folder, "clerkhooks.db")
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        app = _create_app(clerk, database, password)
        try:
            title = "clerkhooks dev: the service, with new keys and a temporary database"
            click.secho(title, bold=True)
            _report("database", str(database))
            _report("server", url)
            demonstration = Demonstration(app, clerk)
            logging.disable(logging.WARNING)  # the demonstration prints the requests itself
            ok = demonstration.run(database)
            logging.disable(logging.NOTSET)
            if not once:
                _serve(app, listener, _instructions(clerk, demonstration.ada, url, password))
        finally:
            disconnect(app)
    return ok


def _interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt for every signal that should end the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup, SIGHUP must stay ignored. SIGINT is always handled, because shells make every
        # background job ignore it.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise CannotDo(
            f"Cannot listen on port {port}: {os.strerror(error.errno or 0)}.\n"
            f"Choose another port: clerkhooks dev --port {port % 65535 + 1}"
        ) from None


def _create_app(clerk: FakeClerk, database: Path, password: str) -> Flask:
    """Create the service and its tables. The environment and ``.env`` are not read."""
    from clerkhooks import create_app

    own = {"DATABASE_URL": f"sqlite:///{database}", "CONSOLE_PASSWORD": password}
    app = create_app(clerk.environ | own)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    return app


def _instructions(clerk: FakeClerk, user_id: str, url: str, password: str) -> str:
    """Describe how to use the running service. All secrets are those of this run."""
    token = clerk.session_token(user_id, lifetime=TOKEN_LIFETIME)
    until = time.strftime("%H:%M %Z", time.localtime(time.time() + TOKEN_LIFETIME))
    secret = f"CLERK_WEBHOOK_SECRET={clerk.environ['CLERK_WEBHOOK_SECRET']}"
    program = f"{shlex.quote(sys.executable)} -m clerkhooks"  # clerkhooks may not be on the PATH
    title = click.style(f"\nServing on {url}. Press Ctrl-C to stop.", bold=True)
    return f"""{title}
Call the API as Ada (her token expires at {until}):

  curl -H 'Authorization: Bearer {token}' {url}/api/me

Post another webhook:

  {secret} {program} send user.created --to {url}/webhooks/clerk

Open the console: {url}/console, any user name, password {password}

To connect your own Clerk application, follow "Set up the service" in README.md.
"""


def _serve(app: Flask, listener: socket.socket, instructions: str) -> None:
    """Print *instructions*, and serve until a signal arrives."""
    port, fd = listener.getsockname()[1], listener.fileno()
    server = make_server(HOST, port, app, threaded=True, fd=fd)
    # The service logs each request itself.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with suppress(KeyboardInterrupt):
        click.echo(instructions)
        server.serve_forever()
    click.echo("\nStopping.")


def _report(subject: str, text: str) -> None:
    click.echo(f"  {click.style(mark(True), fg='green')} {subject:<10}{text}")
