"""Who may look at the console: whoever has its password. Guessing it is braked, and what it shows stays in its pages."""

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
from flask import Flask, Response, request

from clerkhooks.problems import problem

PATH = "/console"
COOKIE = "clerkhooks_console"
KNOWN_FOR = 30 * 86_400  # seconds
GUESSES, PAUSE = 5, 10.0  # wrong passwords in a row; seconds until one more may be tried
CHALLENGE = {"WWW-Authenticate": 'Basic realm="clerkhooks console", charset="UTF-8"'}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex",
}
_ADMITTED = "clerkhooks.console"


class Braked(Exception):
    """Too many wrong passwords; *seconds* until another one may be tried."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Brake:
    """
    Lets some guesses pass at once and then one in a while, over all workers that inherit its file when they are forked.

    The file holds one number: the time at which the last wrong guess will be forgiven. The kernel locks it, and frees the lock of
    a worker that dies.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open for as long as there is somebody to brake
        weakref.finalize(self, self._file.close)
        self._guard = threading.Lock()  # the kernel's lock is the process's, and keeps no thread out

    def attempt(self, is_right: Callable[[], bool]) -> bool:
        """
        Whether *is_right*, which is not asked while the brake is on.

        Raises:
            Braked: if too many have been wrong lately.
        """
        with self._locked() as file:
            now = time.monotonic()  # the same in every process of a machine
            forgiven_at = max(now, struct.unpack("d", os.pread(file, 8, 0).ljust(8, b"\0"))[0])
            wait = forgiven_at - now - PAUSE * (GUESSES - 1)
            if wait > 0:
                raise Braked(math.ceil(wait))
            if is_right():
                return True
            os.pwrite(file, struct.pack("d", forgiven_at + PAUSE), 0)
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


class Gate:
    """
    Lets in whoever sends *password*, under any name.

    A browser that has been in is known by a cookie, and has a brake of its own, so that others who guess cannot keep it out.
    *key* makes that cookie and the seals of searches; neither tells anything of the password to whoever does not have it.
    """

    def __init__(self, password: str, key: bytes) -> None:
        self._password = hashlib.sha256(password.encode()).digest()
        self._known = hmac.new(key, b"known browser" + self._password, "sha256").hexdigest()
        self._brakes = {False: Brake(), True: Brake()}  # by whether the browser is known
        self._fernet = Fernet(base64.urlsafe_b64encode(hmac.new(key, b"console search", "sha256").digest()))

    def admit(self) -> Response | None:
        """The answer that keeps the current request out of what is below the console's path; None lets it in."""
        if not _is_below():
            return None
        sent = _sent_password()
        if sent is None:
            return problem(401, "password_required", CHALLENGE)

        def is_right() -> bool:
            return hmac.compare_digest(hashlib.sha256(sent.encode("utf-8", "replace")).digest(), self._password)

        is_known = hmac.compare_digest(request.cookies.get(COOKIE, "").encode("utf-8", "replace"), self._known.encode())
        try:
            admitted = self._brakes[is_known].attempt(is_right)
        except Braked as braked:
            return problem(429, "too_many_guesses", {"Retry-After": str(braked.seconds)})
        if not admitted:
            return problem(401, "password_wrong", CHALLENGE)
        request.environ[_ADMITTED] = True
        return None

    def finish(self, response: Response) -> Response:
        """Keep what is below the console's path to itself, and know the browser again."""
        if not _is_below():
            return response
        response.headers.update(HEADERS)
        if request.environ.get(_ADMITTED):
            # Whoever pretends to have come by HTTPS only keeps the cookie from themselves.
            said = request.headers.get("X-Forwarded-Proto", "") + request.headers.get("Forwarded", "")
            secure = request.is_secure or "https" in said.lower()
            response.set_cookie(COOKIE, self._known, KNOWN_FOR, path=PATH, secure=secure, httponly=True, samesite="Strict")
        return response

    def seal(self, text: str) -> str:
        """*text* for an address: a platform's router logs those, and an email or a name must not be in a log."""
        return self._fernet.encrypt(text.encode("utf-8", "replace")).decode()

    def unseal(self, sealed: str) -> str | None:
        """What was sealed; None where that cannot be told, as after the secret was replaced."""
        try:
            return self._fernet.decrypt(sealed.encode("utf-8", "replace")).decode()
        except InvalidToken:
            return None


def _is_below() -> bool:
    return request.path == PATH or request.path.startswith(f"{PATH}/")


def _sent_password() -> str | None:
    try:
        sent = request.authorization
    except ValueError:  # werkzeug lets pass what base64 says of characters that are not ASCII
        return None
    return (sent.password or "") if sent is not None and sent.type == "basic" else None


def init_access(app: Flask, password: str, key: bytes) -> Gate:
    """The gate of *app*: before whatever is below the console's path, also what is not there, and behind each answer from it."""
    gate = Gate(password, key)
    app.before_request(gate.admit)
    app.after_request(gate.finish)
    return gate
