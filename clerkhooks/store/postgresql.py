"""PostgreSQL connections of the private engine: timeouts, poolers, failovers, outages."""

from __future__ import annotations

import select
import sys
from collections.abc import Mapping
from functools import cached_property
from time import monotonic
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen
from psycopg.sql import Composable
from sqlalchemy import event

Pooler = Literal["session", "transaction"]
LOCK_TIMEOUT, STATEMENT_TIMEOUT = "2s", "3s"
MAX_IDLE = 30.0  # in seconds; networks drop idle connections only after a longer time
READ_ONLY, STALE_PLAN = "25006", "0A000"
_LIMITS = {"lock_timeout": LOCK_TIMEOUT, "statement_timeout": STATEMENT_TIMEOUT, "timezone": "UTC"}
_SESSION_LIMITS = _LIMITS | {"idle_in_transaction_session_timeout": "15s"}
_LIBPQ = ("psycopg", "psycopg2", "psycopg2cffi")  # drivers that accept libpq's arguments
_KEPT = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
_CHECKED_IN = "clerkhooks.checked_in"


def _set_config(limits: Mapping[str, str], *, is_local: bool) -> bytes:
    calls = (f"set_config('{name}', '{value}', {is_local})" for name, value in limits.items())
    return f"SELECT {', '.join(calls)}".encode()


class TimeoutConnection(psycopg.Connection[Any]):
    """
    A connection that times out if the server does not respond.

    A frozen server does not enforce its own timeouts. Its sockets stay open, so TCP does not
    detect the failure.
    """

    answer_timeout: float | None = 3.5
    """Seconds: longer than STATEMENT_TIMEOUT, so that the server's own error arrives first."""
    statement_timeout = STATEMENT_TIMEOUT
    """The statement timeout that ``LocalLimitsCursor`` sends."""

    @cached_property
    def kept_cursor(self) -> psycopg.Cursor[Any]:
        """A cursor to reuse, because creating one takes 15 µs. Fetch all rows of a result."""
        return self.cursor()

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait for a response, for at most ``answer_timeout`` seconds."""
        try:
            return super().wait(gen, interval, timeout or self.answer_timeout)
        except psycopg.OperationalError:
            if self.info.transaction_status is psycopg.pq.TransactionStatus.ACTIVE:
                # A late response must not be read as the response to the next statement.
                self.close()
            raise


class LocalLimitsCursor(psycopg.ClientCursor[Any]):
    """
    A cursor for a pooler that may use a different server connection for each transaction.

    Session settings and prepared statements would affect other clients. Therefore, the timeouts are
    sent together with each statement, and apply only to the implicit transaction of the statement.
    """

    def execute(self, query: Any, params: Any = None, **options: Any) -> LocalLimitsCursor:
        """Execute *query* with the timeouts, and keep only the result of *query*."""
        if isinstance(query, Composable):
            query = query.as_bytes(self)
        text = query.encode() if isinstance(query, str) else query
        timeout = getattr(self.connection, "statement_timeout", STATEMENT_TIMEOUT)
        limits = _set_config(_LIMITS | {"statement_timeout": timeout}, is_local=True)
        super().execute(limits + b"; " + text, params, **options)
        self.set_result(-1)
        return self


def connect_arguments(
    engine: sa.Engine, options: Mapping[str, Any], pooler: Pooler | None
) -> dict[str, Any]:
    """Return our timeouts and the application's connect arguments, such as certificates."""
    arguments: dict[str, Any] = {
        "connect_timeout": "2",
        # By default, TCP takes hours to detect a dead peer. The user timeout is in milliseconds.
        # The keepalive times are in seconds.
        "tcp_user_timeout": "4000",
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
        # With this setting, text that the server's encoding cannot represent is rejected by the
        # server and not by the driver.
        "client_encoding": "utf8",
    }
    if engine.dialect.driver in _LIBPQ:
        given = options.get("connect_args", {})
        arguments |= {name: given[name] for name in _KEPT.intersection(given)}
    arguments = {name: arguments[name] for name in arguments if name not in engine.url.query}
    if pooler == "transaction":
        arguments |= {"prepare_threshold": None, "cursor_factory": LocalLimitsCursor}
    return arguments | {"autocommit": True}


def listen(engine: sa.Engine) -> None:
    """Set timeouts on each new connection of *engine*, and drop useless connections."""
    event.listen(engine, "connect", _set_limits)
    event.listen(engine, "handle_error", _invalidate_useless)


def listen_with_psycopg(engine: sa.Engine, pooler: Pooler | None) -> None:
    """
    Do the same as ``listen``. Also use ``TimeoutConnection`` and replace stale connections.

    With a pooler in transaction mode, set no timeouts: ``LocalLimitsCursor`` sends them with each
    statement.
    """

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> TimeoutConnection:
        return TimeoutConnection.connect(*arguments, **parameters)

    if pooler != "transaction":
        event.listen(engine, "connect", _set_limits)
    event.listen(engine, "handle_error", _invalidate_useless)
    event.listen(engine, "checkin", _note_checkin)
    event.listen(engine, "checkout", _replace_stale)


def allow_longer_statements(connection: sa.Connection, seconds: float) -> None:
    """
    Set the timeout of statements on *connection* to *seconds*.

    The caller must invalidate the connection after use.
    """
    driver = connection.connection.driver_connection
    timeout = f"{seconds:.0f}s"
    if isinstance(driver, TimeoutConnection):
        driver.answer_timeout, driver.statement_timeout = seconds + 1, timeout
        if driver.cursor_factory is LocalLimitsCursor:
            return
    connection.exec_driver_sql(f"SET statement_timeout = '{timeout}'")


def _set_limits(connection: Any, _record: object) -> None:
    # The timeouts are set after connecting, because poolers reject them as startup parameters.
    connection.cursor().execute(_set_config(_SESSION_LIMITS, is_local=False).decode())


def _invalidate_useless(context: sa.ExceptionContext) -> None:
    """
    Make the pool replace all connections if one of them is useless.

    After a failover, it is read-only. After a migration changed the type of a column, PostgreSQL
    rejects every execution of a statement that was prepared before.
    """
    if getattr(context.original_exception, "sqlstate", None) in (READ_ONLY, STALE_PLAN):
        context.is_disconnect = True


def _note_checkin(_connection: object, record: Any) -> None:
    record.info[_CHECKED_IN] = monotonic()


def _make_poll() -> select.poll:
    """Return an unpatched poll object. The gevent version would switch greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return (monkey.get_original("select", "poll") if monkey else select.poll)()


def _replace_stale(connection: TimeoutConnection, record: Any, _proxy: object) -> None:
    """Make the pool replace a connection that the server or a network may have dropped."""
    is_old = monotonic() - record.info.get(_CHECKED_IN, monotonic()) > MAX_IDLE
    # An idle connection with readable data has been closed by the server. This check needs no round
    # trip.
    poll = _make_poll()  # select() cannot watch descriptors above 1,023
    poll.register(connection.pgconn.socket, select.POLLIN)
    if is_old or poll.poll(0):
        raise sa.exc.DisconnectionError
