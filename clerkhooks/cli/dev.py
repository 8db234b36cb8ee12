"""``clerkhooks dev``: the whole service on this machine, with keys and a database of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from flask import Flask
from flask_migrate import upgrade

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli import demonstration
from clerkhooks.cli.server import HOST, Server, ServerFailed, running_server, signals_as
from clerkhooks.settings import PROJECT, VARIABLES

TOKEN_LIFETIME = 3600  # seconds


class Refused(click.ClickException):
    """It cannot run like this, and nothing was touched: status 2."""

    exit_code = 2


@dataclass(frozen=True)
class Files:
    """What a run writes, all of it in the instance folder."""

    folder: Path

    @property
    def database(self) -> Path:
        """The SQLite file, made anew by each run."""
        return self.folder / "clerkhooks-dev.db"

    @property
    def log(self) -> Path:
        """What the server prints: one line a request."""
        return self.folder / "clerkhooks-dev.log"

    @property
    def lock(self) -> Path:
        """Held while a run lasts; says which one it is."""
        return self.folder / "clerkhooks-dev.lock"


@click.command()
@click.option(
    "--once",
    is_flag=True,
    help="End after the demonstration, with status 0 only if every step did what it should.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to serve on, for this machine only. 0 takes any that is free.",
)
@click.pass_context
def dev(context: click.Context, once: bool, port: int) -> None:
    """
    Run the whole service here and show what it does.

    Needs no Clerk account, no settings and no database server. Makes a SQLite file in the instance
    folder, and keys that are forgotten when it ends; starts the real server; sends it signed
    webhooks and API calls and prints what became of them. Then it goes on serving, for you to try,
    until Ctrl-C.

    Your own settings, .env and database are neither read nor touched. Each run starts over.
    """
    context.exit(run(Files(Path(Flask("clerkhooks").instance_path)), port, once=once))


def run(files: Files, port: int, *, once: bool) -> int:
    """
    Prepare, start, demonstrate and, unless *once*, serve until a signal; return the status.

    Raises:
        Refused: if it cannot run like this.
        ServerFailed: if the server does not start, or ends by itself.
    """
    _require_checkout(PROJECT)
    with signals_as(signal.default_int_handler), _sole_run(files), _listening(port) as listener:
        port = listener.getsockname()[1]
        files.lock.write_text(f"process {os.getpid()}, http://{HOST}:{port}")
        story = demonstration.Story(FakeClerk())
        password = secrets.token_hex(8)
        environ = server_environ(os.environ, story.clerk, files.database, password)
        click.secho(
            "clerkhooks dev: the real server, with keys and a database made for this run", bold=True
        )
        prepare_database(files.database, environ)
        _say("database", f"{_short(files.database)}, migrated")
        with running_server(listener, environ, files.log) as server:
            _say("server", f"http://{HOST}:{port}, gunicorn; its log is {_short(files.log)}")
            well = demonstration.show(story, port, files.database)
            if not once:
                _serve(server, story, port, password, files.log)
    return 0 if well else 1


def server_environ(
    environ: Mapping[str, str], clerk: FakeClerk, database: Path, password: str
) -> dict[str, str]:
    """
    Return *environ* with only *clerk*, *database* and the console's *password* configured.

    Every other variable of ours is there and empty: that counts as unset, and keeps .env from
    setting it.
    """
    others = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("GUNICORN_", "SCRIPT_NAME"))
    }
    own = {"DATABASE_URL": f"sqlite:///{database}", "CONSOLE_PASSWORD": password}
    # gunicorn reads this one by itself, and cannot parse an empty one.
    return others | dict.fromkeys(VARIABLES, "") | clerk.environ | own | {"WEB_CONCURRENCY": "2"}


def prepare_database(database: Path, environ: Mapping[str, str]) -> None:
    """Start over with an empty *database*, migrated by the service that *environ* configures."""
    from clerkhooks import create_app
    from clerkhooks.web.state import disconnect

    for suffix in ("", "-wal", "-shm", "-journal"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    app = create_app(environ)
    with app.app_context():
        upgrade()
    disconnect(app)


def _require_checkout(project: Path) -> None:
    needed = ("wsgi.py", "gunicorn.conf.py", "migrations")
    missing = [name for name in needed if not (project / name).exists()]
    if missing:
        raise Refused(
            f"clerkhooks dev runs from a checkout, and {project} has no {' and no '.join(missing)}.\n"
            "Clone the repository and install it there with: pip install -e ."
        )


@contextmanager
def _sole_run(files: Files) -> Iterator[None]:
    """Keep a second run from starting over with the database of one that still serves."""
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        file = files.lock.open("a+")
    except OSError as error:
        raise Refused(f"Cannot write to {files.folder}: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"clerkhooks dev already runs in this checkout ({files.lock.read_text()}).\n"
                f"Stop that one first: both would use {_short(files.database)}."
            ) from None
        yield


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """Take *port* for the server, on the loopback address only: its keys are for trying things out."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            why = (
                "is taken by another program"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used: {error.strerror}"
            )
            raise Refused(
                f"Port {port} {why}.\nChoose another one, for example: clerkhooks dev --port {port % 65535 + 1}"
            ) from None
        yield listener


def _serve(server: Server, story: demonstration.Story, port: int, password: str, log: Path) -> None:
    """Say how to go on, and wait for a signal."""
    token = story.clerk.session_token(story.ada.id, lifetime=TOKEN_LIFETIME)
    until = time.strftime("%H:%M", time.localtime(time.time() + TOKEN_LIFETIME))
    try:
        click.secho(f"\nServing on http://{HOST}:{port}. Ctrl-C stops it.", bold=True)
        click.echo(f"Call the API as Ada (her token is good until {until}):\n")
        click.echo(f"  curl -H 'Authorization: Bearer {token}' http://{HOST}:{port}/api/me\n")
        click.echo(
            f"See what happened: http://{HOST}:{port}/console, any user name, password {password}\n"
        )
        click.echo(
            "Then with your own Clerk application: put its signing secret (Clerk Dashboard, Webhooks, your endpoint)"
        )
        click.echo(
            f"into {_short(PROJECT / '.env')} as CLERK_WEBHOOK_SECRET=whsec_... and go on with README.md."
        )
        server.wait()
    except KeyboardInterrupt:
        click.echo("\nStopping.")
    else:
        raise ServerFailed(f"The server ended by itself, with status {server.returncode}.", log)


def _say(what: str, text: str) -> None:
    click.echo(f"  {click.style(demonstration.mark(True), fg='green')} {what:<10}{text}")


def _short(path: Path) -> Path:
    """*path* as seen from the working directory, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
