"""The service with common start commands, and behind nginx."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT
from tests.server import environ, free_port
from tests.support import rows, user_event

pytestmark = pytest.mark.slow
TIMEOUT = 30  # seconds
COMMANDS = {
    "gunicorn": "gunicorn wsgi:app",
    "preload": "gunicorn --preload wsgi:app",
    "gthread": "gunicorn -k gthread --threads 4 wsgi:app",
    "sync": "gunicorn -k sync wsgi:app",
    "serve": "clerkhooks serve --migrate",
    "serve with arguments": "clerkhooks serve --workers 1 --bind 127.0.0.1:{port}",
    "flask": "flask --app wsgi run --port {port}",
    "waitress": "waitress --listen 127.0.0.1:{port} wsgi:app",
}


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


@contextmanager
def started(command: list[str], log: Path, variables: dict[str, str]) -> Iterator[None]:
    """Run *command* in a new session until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=variables, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)


Connect = Callable[[], http.client.HTTPConnection]


def ask(
    connect: Connect, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> int:
    """Send one request and return the status, or 0 if there is no response."""
    with closing(connect()) as connection, suppress(OSError, http.client.HTTPException):
        connection.request("POST" if body else "GET", path, body, headers or {})
        response = connection.getresponse()
        response.read()
        return response.status
    return 0


def check(
    connect: Connect, clerk: FakeClerk, database_url: str, log: Path, prefix: str = ""
) -> None:
    """Wait until the service is ready, deliver a small and a large event, and call the API."""
    deadline = time.monotonic() + TIMEOUT
    while ask(connect, f"{prefix}/readyz") != 200:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    for size in (0, 300_000):
        user_id = clerk_id("user")
        body = user_event(user_id, public_metadata={"text": "x" * size})
        assert ask(connect, f"{prefix}/webhooks/clerk", body, clerk.headers(body)) == 200
        token = clerk.session_token(user_id)
        assert ask(connect, f"{prefix}/api/me", headers={"Authorization": f"Bearer {token}"}) == 200
        query = f"SELECT name FROM users WHERE id = '{user_id}'"
        assert rows(database_url, query) == [("Ada Lovelace",)]


def tcp(port: int, host: str = "127.0.0.1") -> Connect:
    """Return a function that connects to a TCP port."""
    return lambda: http.client.HTTPConnection(host, port, timeout=TIMEOUT)


def variables_for(clerk: FakeClerk, database_url: str, port: int) -> dict[str, str]:
    """Return the environment of the service."""
    own = {"DATABASE_URL": database_url, "PORT": str(port), "WEB_CONCURRENCY": "2"}
    return environ(**clerk.environ, **own)


@pytest.mark.parametrize("kind", COMMANDS)
def test_serves(kind: str, database_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """The service works under each command on each database, and logs no traceback."""
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", *COMMANDS[kind].format(port=port).split()]
    with started(command, log, variables_for(clerk, database_url, port)):
        check(tcp(port), clerk, database_url, log)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_binds_to_ipv6(database_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """``--bind`` with an IPv6 address replaces the default."""
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--bind", f"[::1]:{port}", "wsgi:app"]
    with started(command, log, variables_for(clerk, database_url, port)):
        check(tcp(port, "::1"), clerk, database_url, log)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_binds_to_a_unix_socket_below_a_prefix(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """The service works on a Unix socket with the path prefix in ``SCRIPT_NAME``."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is limited to 107 bytes
        path, log = Path(folder) / "socket", tmp_path / "log"
        command = [sys.executable, "-m", "gunicorn", "--bind", f"unix:{path}", "wsgi:app"]
        variables = variables_for(clerk, database_url, 1) | {"SCRIPT_NAME": "/users"}
        with started(command, log, variables):
            check(lambda: UnixConnection(path), clerk, database_url, log, "/users")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("buffering", ["on", "off"])
def test_serves_behind_nginx(
    database_url: str, clerk: FakeClerk, tmp_path: Path, buffering: str
) -> None:
    """The service works behind nginx, with persistent connections and with or without buffering."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        if os.environ.get("REQUIRE_NGINX"):
            pytest.fail("nginx is not installed")
        pytest.skip("nginx is not installed")
    port, front, log = free_port(), free_port(), tmp_path / "log"
    configuration = f"""
    daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;
    events {{}}
    http {{
        access_log off;
        client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;
        fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;
        upstream service {{ server 127.0.0.1:{port}; keepalive 8; }}
        server {{
            listen 127.0.0.1:{front};
            location / {{
                proxy_pass http://service; proxy_http_version 1.1;
                proxy_set_header Connection ""; proxy_set_header Host $host;
                proxy_request_buffering {buffering}; proxy_buffering {buffering};
            }}
        }}
    }}"""
    (tmp_path / "nginx.conf").write_text(configuration)
    command = [sys.executable, "-m", "gunicorn", "wsgi:app"]
    own = ([nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], tmp_path / "nginx.log")
    with (
        started(command, log, variables_for(clerk, database_url, port)),
        started(*own, variables=environ()),
    ):
        check(tcp(front), clerk, database_url, log)
