"""A proxy that records requests and responds in place of the target hosts, over real TLS."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support import serving_in_thread

TIMEOUT = 10.0  # seconds, after which the proxy closes a silent connection
Tunnel = Callable[["Proxy", socket.socket], bool]
"""Reads a client's request for a tunnel, and returns whether the tunnel was opened."""


def connect(proxy: Proxy, client: socket.socket) -> bool:
    """Open a tunnel for an HTTP CONNECT request."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (piece := client.recv(1)):
        head += piece
    method, target, *_ = head.decode().split(" ")
    proxy.targets.append(f"{method} {target}")
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    return method == "CONNECT"


def refuse(proxy: Proxy, client: socket.socket) -> bool:
    """Refuse the tunnel: HTTP proxy authentication is required."""
    proxy.targets.append(client.recv(4096).decode().partition(" HTTP")[0])
    client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    return False


def socks(proxy: Proxy, client: socket.socket) -> bool:
    """Open a tunnel for a SOCKS 5 request. Source: RFC 1928."""
    version, _, method = client.recv(3)
    client.sendall(bytes([version, method]))
    if method == 2:  # RFC 1929
        assert client.recv(4096) == b"\x01\x04user\x06secret"
        client.sendall(b"\x01\x00")
    version, command, _, kind, length = client.recv(5)
    assert (version, command, kind) == (5, 1, 3), "the proxy resolves the name"
    name, (port,) = client.recv(length).decode(), struct.unpack("!H", client.recv(2))
    proxy.targets.append(f"SOCKS {name}:{port}")
    client.sendall(b"\x05\x00\x00\x01" + bytes(6))
    return True


def socks_refusing(proxy: Proxy, client: socket.socket) -> bool:
    """Respond with the SOCKS 5 error for a connection that the ruleset does not allow."""
    client.recv(3)
    client.sendall(b"\x05\x00")
    client.recv(4096)
    proxy.targets.append("SOCKS")
    client.sendall(b"\x05\x02\x00\x01" + bytes(6))
    return False


def socks_password(proxy: Proxy, client: socket.socket) -> bool:
    """Require a password, and record how many bytes the client sends in reply."""
    client.recv(3)
    client.sendall(b"\x05\x02")
    proxy.targets.append(f"{len(client.recv(4096))} bytes")
    return False


def garbled(proxy: Proxy, client: socket.socket) -> bool:
    """Respond with bytes that are neither HTTP nor SOCKS."""
    client.recv(4096)
    proxy.targets.append("")
    client.sendall(b"SSH-2.0-OpenSSH\r\n")
    return False


def hanging_up(proxy: Proxy, client: socket.socket) -> bool:
    """Reset the connection."""
    proxy.targets.append("")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def stalling(proxy: Proxy, _client: socket.socket) -> bool:
    """Send no response."""
    proxy.targets.append("")
    proxy.released.wait(TIMEOUT)
    return False


class Proxy:
    """
    A proxy that responds to requests in place of the target hosts.

    *answers* maps paths to JSON responses. *targets* lists the tunnel requests so far.
    """

    def __init__(self, tunnel: Tunnel, certificate: Path, answers: dict[str, Any]) -> None:
        self.answers, self.targets = answers, list[str]()
        self.released = threading.Event()
        self._tunnel = tunnel
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)
        self._server = ThreadingTCPServer(("127.0.0.1", 0), self._make_handler())
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def open(self) -> Iterator[Proxy]:
        """Serve until the block ends."""
        with serving_in_thread(self._server, self.released):
            yield self

    def _make_handler(self) -> type[BaseRequestHandler]:
        proxy = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(proxy.answers[self.path.partition("?")[0]]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(TIMEOUT)
                with suppress(OSError):
                    if proxy._tunnel(proxy, self.request):
                        with proxy._tls.wrap_socket(self.request, server_side=True) as tls:
                            Answers(tls, self.client_address, self.server)

        return Handler


def write_certificate(file: Path, *hosts: str) -> None:
    """Write a key and a self-signed certificate for *hosts* into one PEM file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clerkhooks tests")])
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    file.write_bytes(private + certificate.public_bytes(pem))
