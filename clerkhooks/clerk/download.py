"""HTTP requests with limits on the total duration and on the size of the response."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from socksio import SOCKSError

from clerkhooks.errors import ProxyUrlError
from clerkhooks.parsing import is_loopback

_PROXY = re.compile("(?:https?|all|no)_proxy", re.IGNORECASE)
_CONNECT_TIMEOUT = 5.0  # seconds


class UnusableAnswer(Exception):
    """The response is truncated, garbled or too long."""


class TooLong(UnusableAnswer):
    """The response has more bytes than allowed."""


class Answer(NamedTuple):
    """A response with any status. Redirects are not followed."""

    status: int
    headers: httpx.Headers
    body: bytes


class Connection:
    """
    A persistent connection to the host of *url*, for one thread at a time.

    It uses the proxy from the environment variables, except for loopback addresses. *timeout* is in
    seconds and covers a whole exchange. *max_size* is in bytes and limits the body. Bodies are
    decompressed only if *compressed* is true, because a small body could expand to any size.

    Raises:
        ProxyUrlError: a proxy in the environment variables is not usable.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout: float,
        max_size: int,
        compressed: bool = False,
        certificates: ssl.SSLContext | None = None,
    ) -> None:
        encoding = {} if compressed else {"Accept-Encoding": "identity"}
        self._timeout, self._max_size, self._compressed = timeout, max_size, compressed
        self._socket: socket.socket | None = None
        self._deadline: float | None = None  # of the current exchange
        self._is_expired = False
        self._guard, self._closed = threading.Lock(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._client = _open_client(
            url,
            headers={**headers, **encoding},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT)),
            limits=httpx.Limits(max_connections=1),
            follow_redirects=False,
            verify=certificates or load_certificates(url) or False,
        )

    def get(self, url: str, parameters: Mapping[str, Any] | None = None) -> Answer:
        """
        Return the response to one request.

        Raises:
            TimeoutError: the exchange took too long.
            httpx.HTTPError: there was no response.
            UnusableAnswer: the body was truncated, garbled or too long.
        """
        return self._send(self._client.build_request("GET", url, params=parameters))

    def post(self, url: str, body: bytes) -> Answer:
        """Return the response to one request. Raise the same errors as ``get``."""
        return self._send(self._client.build_request("POST", url, content=body))

    def _send(self, request: httpx.Request) -> Answer:
        self._begin()
        try:
            answer = self._exchange(request)
        except (httpx.HTTPError, UnusableAnswer):
            if not self._is_expired:
                raise
        finally:
            with self._guard:
                self._deadline = None
        # Without Content-Length, the body ends when the connection closes. A truncated body can
        # therefore look complete.
        if self._is_expired:
            raise TimeoutError("did not answer in time")
        return answer

    def _begin(self) -> None:
        """Set the deadline. Exchanges share a watcher thread, because starting one takes 2 ms."""
        self._is_expired = False
        self._deadline = time.monotonic() + self._timeout
        if self._watcher is None or not self._watcher.is_alive():  # for example after a fork
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._timeout / 20):
            with self._guard:  # otherwise, this could interrupt the next exchange
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._cut()

    def _exchange(self, request: httpx.Request) -> Answer:
        request.extensions["trace"] = self._trace
        try:
            with closing(self._client.send(request, stream=True)) as response:
                return Answer(response.status_code, response.headers, self._read(response))
        except httpx.TransportError:
            self._close_socket()
            raise
        except (SOCKSError, OverflowError) as error:  # a long password causes an OverflowError
            self._close_socket()
            raise httpx.ProxyError("the SOCKS proxy did not connect") from error
        except UnicodeError as error:
            raise httpx.ConnectError("the host name is invalid") from error

    def _close_socket(self) -> None:
        # httpx leaves the socket open if a SOCKS proxy refuses, sends garbage or disconnects.
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        """Close the connection."""
        self._closed.set()
        self._client.close()

    def _read(self, response: httpx.Response) -> bytes:
        body = bytearray()
        try:
            for piece in response.iter_bytes() if self._compressed else response.iter_raw():
                body += piece
                if len(body) > self._max_size:
                    raise TooLong(f"sent more than {self._max_size:,} bytes")
        except (httpx.RemoteProtocolError, httpx.DecodingError):
            raise UnusableAnswer("sent an answer that was cut short or garbled") from None
        return bytes(body)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_expired:  # the time ran out while the connection was being opened
                self._cut()

    def _cut(self) -> None:
        # httpx's timeouts restart with each byte, so a slow stream would never time out.
        self._is_expired = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _open_client(url: str, **options: Any) -> httpx.Client:
    is_proxied = not is_loopback(urlsplit(url).hostname or "")
    try:
        return httpx.Client(trust_env=is_proxied, **options)
    except (ValueError, httpx.InvalidURL):
        raise ProxyUrlError([name for name in os.environ if _PROXY.fullmatch(name)]) from None


def load_certificates(url: str) -> ssl.SSLContext | None:
    """
    Return the certificate authorities for *url*, or None for plain HTTP.

    Loading them takes 20 ms, so connections should share them.
    """
    return httpx.create_ssl_context() if urlsplit(url).scheme == "https" else None


def download(url: str, headers: Mapping[str, str], *, timeout: float, max_size: int) -> Answer:
    """Return the response to a single request; see ``Connection``."""
    with closing(Connection(url, headers, timeout=timeout, max_size=max_size)) as connection:
        return connection.get(url)
