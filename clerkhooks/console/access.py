"""Console access: HTTP Basic with rate-limited attempts and strict response headers."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import math
import os
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cryptography.fernet import Fernet, InvalidToken
from flask import Response, after_this_request, request, url_for

from clerkhooks.web.problems import problem

COOKIE = "clerkhooks_console"
COOKIE_MAX_AGE = 30 * 86_400  # seconds
MAX_FAILURES = 5  # wrong passwords in a row
RETRY_INTERVAL = 10.0  # seconds until one more may be tried
CHALLENGE = {"WWW-Authenticate": 'Basic realm="clerkhooks console", charset="UTF-8"'}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex",
}


class RateLimited(Exception):
    """Too many wrong passwords; *retry_after* is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class RateLimiter:
    """
    A leaky bucket of failed attempts, shared by all workers that were forked from one process.

    They inherit a file that holds one number: the time at which the last failure is forgiven. The
    kernel locks the file, and releases the lock of a worker that dies.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the limiter exists
        weakref.finalize(self, self._file.close)
        self._guard = threading.Lock()  # the kernel's lock belongs to the process, not to a thread

    def attempt(self, is_right: Callable[[], bool]) -> bool:
        """
        Return the result of *is_right*, which is not called while attempts are refused.

        Raises:
            RateLimited: too many attempts have failed recently.
        """
        with self._locked() as file:
            now = time.monotonic()  # the same in every process of a machine
            stored = struct.unpack("d", os.pread(file, 8, 0).ljust(8, b"\0"))[0]
            forgiven_at = max(now, stored)
            wait = forgiven_at - now - RETRY_INTERVAL * (MAX_FAILURES - 1)
            if wait > 0:
                raise RateLimited(math.ceil(wait))
            if is_right():
                return True
            os.pwrite(file, struct.pack("d", forgiven_at + RETRY_INTERVAL), 0)
            return False

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = self._file.fileno()
        with self._guard:
            fcntl.lockf(file, fcntl.LOCK_EX)
            try:
                yield file
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN)


class ConsoleAuth:
    """
    Admits requests that send *password*, with any user name.

    A browser that was admitted before is recognized by a cookie and has a rate limiter of its own:
    an attacker who guesses passwords cannot lock the operator out. *key* signs the cookie and
    encrypts searches; without it, neither reveals anything about the password.
    """

    def __init__(self, password: str, key: bytes) -> None:
        self._password = hashlib.sha256(password.encode()).digest()
        self._cookie = hmac.new(key, b"known browser" + self._password, "sha256").hexdigest()
        self._known_limiter, self._unknown_limiter = RateLimiter(), RateLimiter()
        search_key = hmac.new(key, b"console search", "sha256").digest()
        self._fernet = Fernet(base64.urlsafe_b64encode(search_key))

    def check(self) -> Response | None:
        """Return the response that refuses the current request, or None if it is admitted."""
        sent = _read_password()
        if sent is None:
            return problem(401, "password_required", CHALLENGE)

        def is_right() -> bool:
            digest = hashlib.sha256(sent.encode("utf-8", "replace")).digest()
            return hmac.compare_digest(digest, self._password)

        limiter = self._known_limiter if self._is_known() else self._unknown_limiter
        try:
            is_admitted = limiter.attempt(is_right)
        except RateLimited as limited:
            return problem(429, "too_many_guesses", {"Retry-After": str(limited.retry_after)})
        if not is_admitted:
            return problem(401, "password_wrong", CHALLENGE)
        after_this_request(self._set_cookie)
        return None

    def encrypt(self, text: str) -> str:
        """Encrypt a search for its URL: platforms log URLs, and an email must not be in a log."""
        return self._fernet.encrypt(text.encode("utf-8", "replace")).decode()

    def decrypt(self, token: str) -> str | None:
        """Return what was encrypted, or None if *token* is not of this key."""
        try:
            return self._fernet.decrypt(token.encode("utf-8", "replace")).decode()
        except InvalidToken:
            return None

    def _is_known(self) -> bool:
        sent = request.cookies.get(COOKIE, "").encode("utf-8", "replace")
        return hmac.compare_digest(sent, self._cookie.encode())

    def _set_cookie(self, response: Response) -> Response:
        # A client that forges these headers only withholds the cookie from itself.
        forwarded = request.headers.get("X-Forwarded-Proto", "")
        forwarded += request.headers.get("Forwarded", "")
        response.set_cookie(
            COOKIE,
            self._cookie,
            COOKIE_MAX_AGE,
            path=url_for(".overview"),
            secure=request.is_secure or "https" in forwarded.lower(),
            httponly=True,
            samesite="Strict",
        )
        return response


def set_headers(response: Response) -> Response:
    """Forbid scripts, framing, sniffing and caching."""
    response.headers.update(HEADERS)
    return response


def _read_password() -> str | None:
    try:
        sent = request.authorization
    except ValueError:  # base64 refuses text that is not ASCII, and Werkzeug does not catch it
        return None
    return (sent.password or "") if sent is not None and sent.type == "basic" else None
