"""A PgBouncer in front of a PostgreSQL server."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from tests.server import free_port

TIMEOUT = 20  # seconds


@contextmanager
def pgbouncer(database_url: str, mode: str, **options: str) -> Iterator[str]:
    """Run PgBouncer in *mode*, and yield a URL that connects to the database through it."""
    program = _find_program()
    with psycopg.connect(database_url) as connection:
        parameters = connection.info.get_parameters()
        host, port = connection.info.host, connection.info.port
        name, user = parameters["dbname"], parameters["user"]
    own_port = free_port()
    home = Path(tempfile.mkdtemp(prefix="clerkhooks-pgbouncer-"))
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(own_port),
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": mode,
        "logfile": str(home / "log"),
        **options,
    }
    lines = [
        "[databases]",
        f"{name} = host={host} port={port} user={user} dbname={name}",
        "[pgbouncer]",
        *(f"{key} = {value}" for key, value in settings.items()),
    ]
    (home / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    command = [program, "-q", str(home / "pgbouncer.ini")]
    if os.getuid() == 0:  # PgBouncer refuses to run as root, and needs access to the socket
        owner = Path(host).stat().st_uid if host.startswith("/") else pwd.getpwnam("nobody").pw_uid
        os.chown(home, owner, -1)
        command[1:1] = ["-u", pwd.getpwuid(owner).pw_name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = make_url("postgresql://127.0.0.1").set(port=own_port, username=user, database=name)
    try:
        _wait_until_ready(url.render_as_string(), process)
        yield url.render_as_string()
    finally:
        process.terminate()
        process.wait(TIMEOUT)
        shutil.rmtree(home, ignore_errors=True)


def _find_program() -> str:
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        if os.environ.get("REQUIRE_PGBOUNCER"):
            pytest.fail("pgbouncer is not installed")
        pytest.skip("pgbouncer is not installed")
    return program


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            psycopg.connect(url, connect_timeout=TIMEOUT).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "PgBouncer did not start"
            assert time.monotonic() < deadline, "PgBouncer refuses connections"
            time.sleep(0.05)
