"""A JWKS endpoint over HTTP that records its requests and can misbehave."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.session_tokens import SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.errors import KeysUnavailable, Unauthenticated
from tests.support import join, serving_in_thread

TIMEOUT = 20  # seconds
KID = "ins_fake"
Behaviour = Callable[["Issuer", BaseHTTPRequestHandler], None]


def jwk(clerk: FakeClerk, kid: str = KID, **members: Any) -> dict[str, Any]:
    """Return the public key of *clerk* as Clerk publishes it, with *members* replaced."""
    numbers = RSAAlgorithm.to_jwk(clerk.private_key.public_key(), as_dict=True)
    key = {"alg": "RS256", "e": numbers["e"], "kid": kid, "kty": "RSA", "n": numbers["n"]}
    return key | {"use": "sig"} | members


def key_set(*jwks: Mapping[str, Any]) -> bytes:
    """Return a JWKS with these keys."""
    return json.dumps({"keys": jwks}).encode()


def answering(body: bytes, status: int = 200, **headers: str) -> Behaviour:
    """Return a behaviour that responds with *status* and *body*."""

    def behave(_issuer: Issuer, request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return behave


def stalling(issuer: Issuer, _request: BaseHTTPRequestHandler) -> None:
    """Send no response, and close the connection once ``released`` is set."""
    issuer.released.wait(TIMEOUT)


def stalling_then_publishing(*jwks: Mapping[str, Any]) -> Behaviour:
    """Return a behaviour that responds with these keys once ``released`` is set."""

    def behave(issuer: Issuer, request: BaseHTTPRequestHandler) -> None:
        stalling(issuer, request)
        answering(key_set(*jwks))(issuer, request)

    return behave


def dripping(start: bytes) -> Behaviour:
    """Return a behaviour that sends *start*, then single bytes until ``released`` is set."""

    def behave(issuer: Issuer, request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(start)
        ends = time.monotonic() + TIMEOUT
        while not issuer.released.wait(0.02) and time.monotonic() < ends:
            request.wfile.write(b" ")

    return behave


HTTP = b"HTTP/1.1 200 OK\r\n"
OTHER = FakeClerk()
GOOD = key_set(jwk(OTHER, "ins_other"))
ODD_NUMBERS: list[dict[str, Any]] = [
    {"n": 5},
    {"n": None},
    {"e": "AA"},
    {"e": "AQ"},
    {"n": "é"},
    {"e": []},
]
ELLIPTIC = {"kid": KID, "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}
GZIP = gzip.compress(GOOD)
MISBEHAVIOURS: dict[str, Behaviour] = {
    "HTML": answering(b"<!doctype html><title>Just a moment</title>", Content_Type="text/html"),
    "truncated JSON": answering(GOOD[:-9]),
    "cut short": answering(GOOD, Content_Length="9999"),
    "empty": answering(b""),
    "no keys": answering(key_set()),
    "no set": answering(b"[]"),
    "odd set": answering(b'{"keys": {"a": 1}}'),
    "odd keys": answering(json.dumps({"keys": [None, 5, [], {}, {"kid": ["x"]}]}).encode()),
    "other types": answering(key_set(ELLIPTIC, {"kid": KID, "kty": "oct"})),
    "other uses": answering(
        key_set(jwk(OTHER, use="enc"), jwk(OTHER, alg="RS512"), jwk(OTHER, kty="rsa"))
    ),
    "short key": answering(key_set(jwk(OTHER, n="u" * 171))),
    "huge key": answering(key_set(jwk(OTHER, n="u" * 20_000))),
    "odd numbers": answering(key_set(*(jwk(OTHER, **odd) for odd in ODD_NUMBERS))),
    "redirect": answering(GOOD, 302, Location="/elsewhere"),
    "moved": answering(GOOD, 301, Location="/elsewhere"),
    "not modified": answering(b"", 304),
    "10 MB": answering(b" " * 10_000_000 + GOOD),
    "compressed unasked": answering(GZIP, Content_Encoding="gzip"),
    "500": answering(GOOD, 500),
    "stalled": stalling,
    "no HTTP": dripping(b"SSH-2.0-OpenSSH\r\n"),
    "dripping body": dripping(HTTP + b"Content-Length: 100000\r\n\r\n" + GOOD),
    "dripping headers": dripping(HTTP + b"X: "),
}
"""Responses without a usable key set, by name."""


class Issuer:
    """The JWKS endpoint. *requests* lists the headers and client address of each request."""

    def __init__(self, *jwks: Mapping[str, Any]) -> None:
        self.behaviour = answering(key_set(*jwks))
        self.released = threading.Event()
        self.requests: list[tuple[dict[str, str], tuple[str, int]]] = []
        self._arrival = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._request_handler())
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.origin}/.well-known/jwks.json"

    def publish(self, *jwks: Mapping[str, Any]) -> None:
        """Respond with these keys from now on."""
        self.behaviour = answering(key_set(*jwks))

    def wait_for(self, count: int) -> None:
        """Wait until *count* requests have arrived."""
        with self._arrival:
            arrived = self._arrival.wait_for(lambda: len(self.requests) >= count, timeout=15)
        assert arrived, f"{len(self.requests)} of {count} requests arrived"

    @contextmanager
    def open(self) -> Iterator[Issuer]:
        """Serve until the block ends."""
        with serving_in_thread(self._server, self.released):
            yield self

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 60  # seconds, after which a silent client is disconnected

            def do_GET(self) -> None:
                with issuer._arrival:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    headers[":path"] = self.path
                    issuer.requests.append((headers, self.client_address))
                    behaviour = issuer.behaviour
                    issuer._arrival.notify_all()
                with suppress(ConnectionError):
                    behaviour(issuer, self)

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        return Handler


class Clock:
    """A monotonic clock that a test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


def wait_for_fetches() -> None:
    """Wait until no fetch of signing keys is in progress."""
    fetches = [thread for thread in threading.enumerate() if thread.name == "signing-keys"]
    join(*fetches, seconds=10)


def fetched(keys: FetchedKeys) -> FetchedKeys:
    """Fetch *keys* and return them."""
    keys.fetch_soon()
    wait_for_fetches()
    return keys


def refusal_reason(
    keys: FetchedKeys | SessionVerifier, clerk: FakeClerk, kid: str = KID
) -> str | None:
    """Return the reason why a new token from *clerk* is refused, or None if it is valid."""
    verifier = keys if isinstance(keys, SessionVerifier) else SessionVerifier(keys, TokenRules())
    try:
        verifier.verify(clerk.session_token(clerk_id("user"), header={"kid": kid}), time.time())
    except (Unauthenticated, KeysUnavailable) as error:
        return error.reason
    return None
