"""GET requests with limits on the time of the whole exchange and the size of the answer."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

_CONNECT_TIMEOUT = 5.0  # seconds


class UnusableAnswer(Exception):
    """An answer that cannot be used: cut short, garbled or too long."""


class TooLong(UnusableAnswer):
    """An answer with more bytes than allowed."""


class Answer(NamedTuple):
    """An answer of any status. Redirects are not followed."""

    status: int
    headers: httpx.Headers
    body: bytes


class Connection:
    """
    A connection that is kept between requests. Only one thread at a time may use it.

    *timeout* is in seconds and covers a whole exchange; *max_size* is in bytes of the body. Without
    *compressed* a body is never decompressed, as a small one could then use any amount of memory.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        *,
        timeout: float,
        max_size: int,
        compressed: bool = False,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        encoding = {} if compressed else {"Accept-Encoding": "identity"}
        self._timeout, self._max_size, self._compressed = timeout, max_size, compressed
        self._socket: socket.socket | None = None
        self._is_expired = False
        self._client = httpx.Client(
            headers={**headers, **encoding},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT)),
            limits=httpx.Limits(max_connections=1),
            follow_redirects=False,
            verify=verify,
        )

    def get(self, url: str, parameters: Mapping[str, Any] | None = None) -> Answer:
        """
        Return the answer to one request.

        Raises:
            TimeoutError: it took too long.
            httpx.HTTPError: there was no answer.
            UnusableAnswer: the body was cut short, garbled or too long.
        """
        self._is_expired = False
        timer = threading.Timer(self._timeout, self._cut)
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream(
                "GET", url, params=parameters, extensions={"trace": self._trace}
            ) as response:
                answer = Answer(response.status_code, response.headers, self._read(response))
        except (httpx.HTTPError, UnusableAnswer):
            if not self._is_expired:
                raise
        finally:
            timer.cancel()
            timer.join()  # it must not cut the next exchange
        # A body without a length ends with the connection, so it may look complete.
        if self._is_expired:
            raise TimeoutError("did not answer in time")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _read(self, response: httpx.Response) -> bytes:
        body = bytearray()
        try:
            for piece in response.iter_bytes() if self._compressed else response.iter_raw():
                body += piece
                if len(body) > self._max_size:
                    raise TooLong(f"answered more than {self._max_size:,} bytes")
        except (httpx.RemoteProtocolError, httpx.DecodingError):
            raise UnusableAnswer("sent an answer that was cut short or garbled") from None
        return bytes(body)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_expired:  # the timer fired during the attempt to connect
                self._cut()

    def _cut(self) -> None:
        # httpx' own timeouts start anew with each byte, so a trickling answer would never end.
        self._is_expired = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def download(url: str, headers: Mapping[str, str], *, timeout: float, max_size: int) -> Answer:
    """Return the answer to a single request; see ``Connection``."""
    # Loading the certificates takes 20 ms, which plain HTTP to this machine does not need.
    verify = urlsplit(url).scheme != "http"
    with closing(
        Connection(headers, timeout=timeout, max_size=max_size, verify=verify)
    ) as connection:
        return connection.get(url)
