"""The private engine's PostgreSQL connections after a failover or a lost NAT mapping."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import psycopg
import pytest
from flask import Flask
from sqlalchemy import make_url

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.store import postgresql
from clerkhooks.store.database import Database
from clerkhooks.web.state import disconnect
from tests.support import NOW_MS, Service, user_event

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def database_of(app: Flask) -> Database:
    """Return the database of the private engine."""
    database: Database = app.extensions["clerkhooks"].store.database
    return database


def execute_on_each_connection(service: Service, statement: str, count: int) -> None:
    """Open *count* pooled connections and execute *statement* on each."""
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(database_of(service.app).connect())
            connection.exec_driver_sql(statement)


def test_replaces_all_sessions_that_have_become_read_only(service: Service) -> None:
    """After a demotion, one delivery fails. Its retry and all later deliveries succeed."""
    execute_on_each_connection(service, "SET default_transaction_read_only = on", 4)
    message_id, user_id = clerk_id("msg"), clerk_id("user")
    answers = [service.deliver(user_event(user_id), message_id).status_code for _ in range(2)]
    assert answers == [500, 200]
    execute_on_each_connection(service, "SELECT 1", 4)
    others = [service.deliver(user_event(clerk_id("user"))).status_code for _ in range(4)]
    assert others == [200] * 4


def test_is_not_ready_while_sessions_are_read_only(service: Service) -> None:
    """``/readyz`` returns 503 if it finds a read-only session, and closes that session."""
    execute_on_each_connection(service, "SET default_transaction_read_only = on", 1)
    answers = [service.http.get("/readyz") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 200]
    assert answers[0].get_json()["reason"] == "database_read_only"


def test_does_not_mistake_replication_lag_for_a_deletion(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an existing row cannot be read, the response is a 500, not the 401 for deleted users."""
    users: Any = service.app.extensions["clerkhooks"].users
    user_id = clerk_id("user")
    assert service.outcome(user_event(user_id)) == "applied"
    monkeypatch.setattr(users, "_read", lambda _: None)
    assert service.call(user_id).status_code == 500


class ForgetfulNetwork:
    """A TCP proxy that can silently drop its connections, as a NAT gateway does."""

    def __init__(self, host: str, port: int) -> None:
        path = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None
        self._target: Any = path or (host, port)
        self._family = socket.AF_UNIX if path else socket.AF_INET
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._forgotten: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def forget(self) -> None:
        """Silently drop all further data on the current connections, without closing them."""
        self._forgotten.update(self._sockets)

    def close(self) -> None:
        """Stop listening and close all connections. This ends the daemon threads."""
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):  # raised after close()
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(self._family)
                server.connect(self._target)
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._forgotten:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def network(database_url: str) -> Iterator[ForgetfulNetwork]:
    """Run a ``ForgetfulNetwork`` in front of the database."""
    with psycopg.connect(database_url) as connection:
        host, port = connection.info.host, connection.info.port
    with closing(ForgetfulNetwork(host, port)) as network:
        yield network


def test_does_not_use_a_connection_that_the_network_has_dropped(
    database_url: str,
    clerk: FakeClerk,
    network: ForgetfulNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that has been idle for longer than ``MAX_IDLE`` is replaced before use."""
    with psycopg.connect(database_url) as connection:
        user, name = connection.info.user, connection.info.dbname
    url = make_url("postgresql://127.0.0.1").set(port=network.port, username=user, database=name)
    app = create_app(clerk.environ | {"DATABASE_URL": url.render_as_string()})
    try:
        service = Service(app, clerk, database_url)
        assert service.deliver(user_event(clerk_id("user"))).status_code == 200
        network.forget()
        monkeypatch.setattr(postgresql, "MAX_IDLE", 0.0)
        user_id = clerk_id("user")
        answers = [
            service.deliver(user_event(user_id, at=NOW_MS + at)).status_code for at in range(2)
        ]
        assert answers == [200, 200]
    finally:
        disconnect(app)


def test_sends_keepalives(service: Service) -> None:
    """The kernel probes an idle connection after 30 s, and drops it after 4 s without a reply."""
    with database_of(service.app).connect() as connection:
        driver: Any = connection.connection.driver_connection
        options = dict(driver.info.get_parameters())
    assert {name: options[name] for name in ("keepalives_idle", "tcp_user_timeout")} == {
        "keepalives_idle": "30",
        "tcp_user_timeout": "4000",
    }
    assert re.fullmatch("[0-9]+", options["keepalives_count"])
