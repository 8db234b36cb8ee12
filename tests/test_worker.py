"""The worker class without a server: connections, deadlines and limits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clerkhooks.settings import PROJECT

# Runs in a separate process: event loops are per thread, and resource limits per process.
SETUP = """
import resource, socket, time
import gevent
from gunicorn.config import Config
from gunicorn.glogging import Logger
from clerkhooks.web import worker
from clerkhooks.web.worker import Worker, raise_descriptor_limit

worker.REQUEST_TIMEOUT = 0.6
worker.INTERVAL = 0.05

def application(environ, start_response):
    body = environ["wsgi.input"].read()
    if environ["PATH_INFO"] == "/large":
        body = b"x" * 50_000_000
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

class App:
    @staticmethod
    def wsgi():
        return application

config = Config()
for name, value in {"keepalive": 2, "worker_connections": 10, "workers": 2, **OPTIONS}.items():
    config.set(name, value)
listener = socket.create_server(("127.0.0.1", 0))
served = gevent.socket.socket(fileno=listener.detach())
address = served.getsockname()

class Listener:
    FAMILY, sock = served.family, served

own = Worker(0, __import__("os").getppid(), [served], App, 30, config, Logger(config))
own.wsgi = application
running = gevent.spawn(own.run)

def connect(sent=b""):
    connection = gevent.socket.create_connection(address)
    connection.sendall(sent)
    connection.settimeout(8)
    return connection

def seconds_until_end(connection):
    began, received = time.monotonic(), b""
    while piece := connection.recv(65536):
        received += piece
    return time.monotonic() - began, received

def stop():
    own.alive = False
    running.join(8)
    assert running.successful()

HEAD = b"POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: "
"""


def run(script: str, **options: object) -> None:
    """Run SETUP and *script*, which contains the assertions, in a new process."""
    code = SETUP.replace("OPTIONS", repr(options)) + script
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_keeps_a_connection_open_while_it_is_used() -> None:
    """Sequential and pipelined requests share a connection until the keepalive timeout."""
    run("""
connection = connect(HEAD + b"1\\r\\n\\r\\na" + HEAD + b"2\\r\\n\\r\\nbc")
gevent.sleep(1)
connection.sendall(HEAD + b"1\\r\\n\\r\\nd")
took, received = seconds_until_end(connection)
assert [part[-1:] for part in received.split(b"HTTP/1.1 200 OK")] == [b"", b"a", b"c", b"d"]
assert 1.9 <= took < 4, took
assert not own._connections and not own._waiting
stop()
""")


@pytest.mark.parametrize(
    ("sent", "keepalive"),
    [
        ("b'POST'", 2),
        ("HEAD + b'9\\r\\n\\r\\na'", 0),
        pytest.param("b'POST'", 0, marks=pytest.mark.slow),
        pytest.param("HEAD + b'9\\r\\n\\r\\na'", 2, marks=pytest.mark.slow),
    ],
)
def test_gives_a_request_a_deadline(sent: str, keepalive: int) -> None:
    """The deadline counts from the first byte, whether the header or the body is slow."""
    run(
        f"""
connection = connect({sent})
took, _ = seconds_until_end(connection)
assert 0.5 <= took < 1.5, took
stop()
""",
        keepalive=keepalive,
    )


def test_gives_up_on_a_client_that_does_not_read() -> None:
    """A connection is closed if the client does not read the response."""
    run("""
connection = connect(b"GET /large HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
gevent.sleep(1.5)
assert not own._connections
stop()
""")


SENDER = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
head, piece = (bytes.fromhex(text) for text in sys.argv[2:])
connection.sendall(head)
while True:
    connection.sendall(piece * 100)
"""


@pytest.mark.parametrize(
    ("framing", "piece"),
    [
        pytest.param(b"Content-Length: 99999999999", b"a" * 1000, marks=pytest.mark.slow),
        (b"Transfer-Encoding: chunked", b"400\r\n" + b"a" * 0x400 + b"\r\n"),
    ],
)
def test_serves_others_beside_a_client_that_never_pauses(framing: bytes, piece: bytes) -> None:
    """A body that the application does not read is discarded, then the connection is closed."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n"
    arguments = [sys.executable, "-c", SENDER, head.hex(), piece.hex()]
    run(
        f"ARGUMENTS = {arguments!r}"
        + """
import subprocess
own.wsgi = lambda environ, start: start("200 OK", [("Content-Length", "0")]) and ()
worker.REQUEST_TIMEOUT = 2
ARGUMENTS.insert(3, str(address[1]))
sender = subprocess.Popen(ARGUMENTS, stderr=subprocess.DEVNULL)
try:
    began, served = time.monotonic(), 0
    while not own._connections:
        assert time.monotonic() - began < 20
        gevent.sleep(0.01)
    began = time.monotonic()
    while own._connections:
        assert time.monotonic() - began < 10
        last = connect(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        took, received = seconds_until_end(last)
        assert received.startswith(b"HTTP/1.1 200") and took < 1, (received, took)
        served += 1
    assert served > 5, served
finally:
    sender.kill()
    sender.wait()
stop()
"""
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /?token=Zq7 x HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization Bearer Zq7\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZq7\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: Zq7\r\n\r\n",
    ],
)
def test_quotes_nothing_of_a_malformed_request(sent: bytes) -> None:
    """The response is 400, not 501, and the content is neither logged nor sent back."""
    run(
        f"SENT = {sent!r}"
        + """
import io, sys
sys.stderr.flush()
own.log.error_log.handlers[0].setStream(logged := io.StringIO())
received = seconds_until_end(connect(SENT))[1]
assert b" 400 Bad Request" in received and b"Zq7" not in received, received
assert "malformed" in logged.getvalue() and "Zq7" not in logged.getvalue(), logged.getvalue()
stop()
"""
    )


def test_closes_idle_connections_near_its_limit() -> None:
    """With a limit of ten, nine connections stay open; a new one replaces the longest-idle."""
    run("""
connections = [connect() for _ in range(9)]
gevent.sleep(0.3)
assert len(own._connections) == 9
connections += [connect() for _ in range(3)]
for old in connections[:3]:
    assert seconds_until_end(old)[0] < 1
assert list(own._connections.values()) == list(own._waiting)
assert len(own._connections) == 9
stop()
""")


def test_accepts_more_at_once_while_busy() -> None:
    """A worker accepts one connection at a time, or three if it has 16 open requests."""
    run("""
server = own.server_class(served, spawn=None)
assert server.max_accept == 1
own._connections = dict.fromkeys(range(16))
assert server.max_accept == 3
own._connections = {}
stop()
""")


def test_closes_idle_connections_when_it_stops() -> None:
    """Idle connections are closed at once; a request that has begun to arrive is finished."""
    run("""
idle, begun = connect(), connect(HEAD + b"1\\r\\n\\r\\n")
gevent.sleep(0.1)
own.alive = False
assert seconds_until_end(idle)[0] < 0.5
begun.sendall(b"a")
assert seconds_until_end(begun)[1].endswith(b"a")
stop()
""")


def test_sends_what_follows_a_held_header_in_order() -> None:
    """
    The response header is held back until it can be sent together with the body.

    The order is correct for a short body, a file and a stream, and if there is no body. Each part
    of a stream is sent without delay.
    """
    run("""
import struct, sys, tempfile
file = tempfile.TemporaryFile()
file.write(b"of a file")
released = gevent.event.Event()

def stream():
    yield b"begun"
    released.wait(5)
    yield b"ended"

def answer(environ, start_response):
    path = environ["PATH_INFO"]
    start_response("204 No Content" if path == "/none" else "200 OK", [])
    if path == "/file":
        file.seek(0)
        return environ["wsgi.file_wrapper"](file)
    return {"/none": [], "/stream": stream(), "/short": [b"short"]}[path]

own.wsgi = answer
for path, body in (("short", b"short"), ("none", b""), ("file", b"of a file")):
    connection = connect(f"GET /{path} HTTP/1.0\\r\\n\\r\\n".encode())
    received = connection.recv(65536) if path == "short" else seconds_until_end(connection)[1]
    assert received.startswith(b"HTTP/1.0 20"), received
    assert received.endswith(b"\\r\\n\\r\\n" + body), received
connection = connect(b"GET /stream HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
assert connection.recv(65536).endswith(b"\\r\\n\\r\\n5\\r\\nbegun\\r\\n")
released.set()
assert connection.recv(65536).startswith(b"5\\r\\nended\\r\\n")
if sys.platform == "linux":  # a short answer is one segment
    connection = connect(b"GET /short HTTP/1.0\\r\\n\\r\\n")
    assert seconds_until_end(connection)[1].endswith(b"short")
    counters = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    assert struct.unpack_from("I", counters, 152) == (1,)  # tcpi_data_segs_in
stop()
""")


def test_serves_tls_like_its_base_class() -> None:
    """A TLS connection is handled by gunicorn's gevent worker, with that worker's timeout."""
    run("""
import ssl
from gunicorn.workers.ggevent import GeventWorker
seen = []
GeventWorker.handle = lambda *arguments: seen.append(arguments[2])
context = ssl.create_default_context()
client = context.wrap_socket(
    socket.socket(), do_handshake_on_connect=False, server_hostname="x"
)
own.handle(None, client, None)
assert seen == [client] and not own._connections
assert isinstance(own.timeout_ctx(), gevent.Timeout)
stop()
""")


def test_raises_the_descriptor_limit_as_far_as_allowed() -> None:
    """The limit is raised to the hard limit, capped at 65,536, and is never lowered."""
    run("""
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
hard = limits[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65536)
infinite = resource.RLIM_INFINITY
asked = []
resource.getrlimit = lambda _: ((asked or [(500, infinite)])[-1])
resource.setrlimit = lambda _, limits: asked.append(limits)
assert raise_descriptor_limit() == 65536 and asked == [(65536, infinite)]
asked.append((infinite, infinite))
assert raise_descriptor_limit() == 65536 and len(asked) == 2
stop()
""")


# Own constants make a wait of one second for another worker, and 0.2 s is immediate.
BALANCING = """
from clerkhooks.web import balance
balance.PAUSE, balance.MAX_PAUSES, balance.MAX_AGE = 0.2, 5, 60
published, connections = worker._open_connections, []

def seconds_to_accept():
    began, before = time.monotonic(), own._open
    connections.append(connect())
    while own._open == before:
        assert time.monotonic() - began < 5
        gevent.sleep(0.01)
    return time.monotonic() - began
"""


def test_leaves_connections_to_a_worker_that_has_fewer() -> None:
    """A worker accepts at once unless another one has fewer connections. It waits at most 1 s."""
    run(
        BALANCING
        + """
assert seconds_to_accept() < 0.2 and seconds_to_accept() < 0.2  # it is the only worker
published.publish(1, 2)
assert seconds_to_accept() < 0.2
assert 0.9 < seconds_to_accept() < 1.8
gevent.spawn_later(0.5, published.publish, 1, 4)
assert 0.5 < seconds_to_accept() < 0.9
assert 0.9 < seconds_to_accept() < 1.8
own._open = worker.FEW
assert seconds_to_accept() < 0.2
stop()
""",
        keepalive=10,
    )


def test_accepts_when_its_own_connections_end() -> None:
    """Clients that open a new connection for each request are not delayed."""
    run(
        BALANCING
        + """
balance.PAUSE = 1
published.publish(1, 0)
for _ in range(5):
    took, received = seconds_until_end(connect(b"GET / HTTP/1.0\\r\\n\\r\\n"))
    assert received.startswith(b"HTTP/1.0 200") and took < 0.5 and own._open == 0, took
first = connect()
gevent.sleep(0.1)
second = connect(b"GET / HTTP/1.0\\r\\n\\r\\n")
gevent.spawn_later(0.1, first.close)
assert 0.05 < seconds_until_end(second)[0] < 0.5
stop()
"""
    )


def test_does_not_wait_for_a_worker_that_was_killed() -> None:
    """The number that a killed worker has published expires."""
    run(
        BALANCING
        + """
import os, signal
balance.MAX_AGE = 0.5
assert seconds_to_accept() < 0.2 and seconds_to_accept() < 0.2
child = os.fork()
if not child:
    published.publish(1, 1)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
assert published.least() == 1 and own.should_pause()
gevent.sleep(0.6)
assert published.least() == 2 and seconds_to_accept() < 0.2
stop()
"""
    )


def test_leaves_connections_to_others_when_it_stops() -> None:
    """A stopping worker withdraws its number, and prefers that another worker accepts."""
    run(
        BALANCING
        + """
published.publish(1, 7)
gevent.sleep(0.1)
assert published.least() == 0 and not own.should_pause()
own.alive = False
gevent.sleep(0.1)
assert published.least() == 7 and own.should_pause()
stop()
"""
    )


def test_does_not_wait_if_each_worker_has_its_own_queue() -> None:
    """With ``reuse_port``, no other worker can accept the connection."""
    run(BALANCING + "gevent.sleep(0.1)\nassert published.least() > 9\nstop()", reuse_port=True)


def test_works_with_more_workers_than_slots() -> None:
    """Workers that share a slot do not prevent each other from accepting connections."""
    run(
        BALANCING
        + """
for number in range(1, 3 * balance.SLOTS):
    published.publish(number, number)
assert seconds_to_accept() < 0.2
stop()
"""
    )


def test_waits_longer_after_each_error_of_accept() -> None:
    """If no descriptors are left, the worker's own pauses do not change gevent's delays."""
    run(
        BALANCING
        + """
balance.PAUSE, attempts, read = 0.001, [], balance.StreamServer.do_read

def fail(server):
    attempts.append(time.monotonic())
    raise OSError(24, "Too many open files")

for _ in range(5):
    seconds_to_accept()
published.publish(1, 0)
balance.StreamServer.do_read = fail
last = connect()
gevent.sleep(0.5)
published.withdraw(1)
for connection in connections:
    connection.close()
    gevent.sleep(0.1)
assert 4 <= len(attempts) <= 8, attempts
balance.StreamServer.do_read = read
gevent.sleep(1.5)
assert own._open == 1
stop()
""",
        keepalive=10,
    )
