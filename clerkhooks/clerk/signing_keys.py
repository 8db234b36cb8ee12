"""The keys that session tokens are signed with: configured, or fetched from Clerk and kept through its outages."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk import strict_json
from clerkhooks.errors import KeysUnavailable, Unauthenticated, describe

logger = logging.getLogger(__name__)
TIMEOUT = 3.0  # seconds, for a whole fetch, and for waiting on somebody else's
STUCK_AFTER = 30.0  # seconds until a fetch is given up that not even its timeout ends, as when the resolver hangs
BRIEFLY = 0.5  # seconds: an issuer that is well answers sooner
LARGEST_ANSWER = 256 * 1024  # bytes; Clerk's is some 2 kB
REFRESH_AFTER = 5 * 60.0  # seconds
COOLDOWN = 30.0  # seconds between two fetches, also after one that failed
KEEP_FOR = 12 * 3600.0  # seconds that keys are used without their issuer confirming them


class SigningKeys(Protocol):
    """Where a verifier finds keys."""

    def refresh_if_due(self) -> int | None:
        """
        Have the keys confirmed in the background if that is due.

        Gives the number of their generation, another one whenever they are others; None where none
        counts.
        """

    def require_any(self) -> None:
        """
        Wait for a first key where there is none yet.

        Raises:
            KeysUnavailable: if there is none to be had.
        """

    def find(self, kid: object) -> Sequence[RSAPublicKey]:
        """
        The keys that may have signed a token whose header says *kid*.

        Raises:
            Unauthenticated: ``unknown_key``.
            KeysUnavailable: if there is no key to be had at all.
        """


@dataclass(frozen=True)
class ConfiguredKeys:
    """Keys that were configured: each is tried, whatever a token calls its own."""

    keys: tuple[RSAPublicKey, ...]

    def refresh_if_due(self) -> int:
        """They never change."""
        return 0

    def require_any(self) -> None:
        """There may be none."""
        if not self.keys:
            raise KeysUnavailable("keys_not_configured", retry_after=300)

    def find(self, kid: object) -> Sequence[RSAPublicKey]:
        """All of them."""
        self.require_any()
        return self.keys


@dataclass(frozen=True)
class _KeySet:
    """What one good answer said. *fetched_at* in seconds of the monotonic clock."""

    keys: Mapping[str, RSAPublicKey]
    fetched_at: float
    generation: int


@dataclass
class FetchedKeys:
    """
    The keys at *url*, for one process.

    A known key never makes a request wait. One fetch at a time, in a thread of its own; one within
    the cooldown at most, so that forged tokens cost Clerk nothing; and only a good answer ever
    replaces what is known.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    keep_for: float = KEEP_FOR
    cooldown: float = COOLDOWN
    refresh_after: float = REFRESH_AFTER
    on_fetch: Callable[[bool], object] = field(default=lambda _well: None, repr=False)

    def __post_init__(self) -> None:
        self._known = _KeySet({}, -math.inf, 0)
        self._guard = threading.Lock()
        self._tried_at = -math.inf
        self._fetch: threading.Thread | None = None

    def refresh_if_due(self) -> int | None:
        """Fetch in the background what is older than five minutes; None once what is known is too old to count."""
        known = self._known
        age = time.monotonic() - known.fetched_at
        if age >= self.refresh_after:
            self.fetch_soon()
        return known.generation if age < self.keep_for else None

    @property
    def age(self) -> float | None:
        """Seconds since the last good answer; None before the first."""
        return time.monotonic() - self._known.fetched_at if self._known.keys else None

    def find(self, kid: object) -> Sequence[RSAPublicKey]:
        """The one key of that id, fetched if it is not known and the cooldown allows it."""
        self.refresh_if_due()
        self.require_any()
        name = kid if isinstance(kid, str) else ""
        key = self._usable().get(name)
        if key is None:
            self._wait_for_fetch()
            key = self._usable().get(name)
        if key is None:
            raise Unauthenticated("unknown_key")
        return (key,)

    def require_any(self) -> None:
        """The first fetch may still be under way."""
        if not self._usable():
            self._wait_for_fetch()
        if not self._usable():
            raise KeysUnavailable(
                "keys_unavailable",
                retry_after=max(1, math.ceil(self.cooldown - self._since_tried())),
            )

    def _wait_for_fetch(self) -> None:
        # A fetch that somebody else started serves as well; where none is under way and none
        # allowed, nobody waits. With keys at hand only who started it waits long: else a flood of
        # forged tokens could hold every thread.
        fetch, is_ours = self._start_or_join()
        if fetch is not None:
            fetch.join(TIMEOUT if is_ours or not self._usable() else BRIEFLY)

    def fetch_soon(self) -> threading.Thread | None:
        """Start a fetch, or give the one that is under way; None in the cooldown."""
        return self._start_or_join()[0]

    def _start_or_join(self) -> tuple[threading.Thread | None, bool]:
        """A fetch, and whether this call started it."""
        with self._guard:
            elapsed = self._since_tried()
            if (
                self._fetch is not None
                and self._fetch.is_alive()
                and elapsed < max(self.cooldown, STUCK_AFTER)
            ):
                return self._fetch, False
            if elapsed < self.cooldown:
                return None, False
            fetch = threading.Thread(target=self._fetch_now, name="signing-keys", daemon=True)
            self._tried_at, self._fetch = time.monotonic(), fetch
            try:
                fetch.start()
            except RuntimeError:  # the machine has no thread left: what is known serves on
                return None, False
            return fetch, True

    def _since_tried(self) -> float:
        return time.monotonic() - self._tried_at

    def _usable(self) -> Mapping[str, RSAPublicKey]:
        known = self._known
        return known.keys if time.monotonic() - known.fetched_at < self.keep_for else {}

    def _fetch_now(self) -> None:
        try:
            keys = parse_key_set(download(self.url, self.headers))
        except Exception as error:  # noqa: BLE001  # whatever an endpoint may answer, the known keys stay
            self.on_fetch(False)
            logger.warning(
                "signing_keys_not_fetched",
                extra={"error": describe(error), "keys_known": len(self._usable())},
            )
            return
        with self._guard:
            # The answer to a fetch that was given up is older than what has been learnt since.
            in_time = self._fetch is threading.current_thread()
            if in_time:
                known = self._known
                self._known = _KeySet(
                    keys, time.monotonic(), known.generation + (keys != known.keys)
                )
        self.on_fetch(in_time)


def download(url: str, headers: Mapping[str, str]) -> bytes:
    """
    Return the body at *url*, read within a few seconds and 256 KiB.

    Raises:
        ValueError: the status is not 200, or the body is too long; redirects are not followed.
        TimeoutError, httpx.HTTPError: no answer, or not in time.
    """
    # Compressed, a small body could unfold to any size.
    plain = {**headers, "Accept-Encoding": "identity"}
    body = bytearray()
    with (
        _deadline(TIMEOUT) as trace,
        httpx.Client(timeout=TIMEOUT) as client,
        client.stream("GET", url, headers=plain, extensions={"trace": trace}) as response,
    ):
        if response.status_code != 200:
            raise ValueError("not answered with 200")
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > LARGEST_ANSWER:
                raise ValueError("too long")
    return bytes(body)


@contextmanager
def _deadline(seconds: float) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """
    Cut the connection of a request after *seconds*; yields its trace function for httpx.

    httpx' own timeouts begin anew with each byte, so that a dripping answer would never end.

    Raises:
        TimeoutError: the connection was cut.
    """
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def trace(event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            sockets.append(info["return_value"].get_extra_info("socket"))
            if expired.is_set():  # the timer ran while this one was connecting
                cut()

    def cut() -> None:
        expired.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield trace
    except httpx.HTTPError:
        if not expired.is_set():
            raise
    finally:
        timer.cancel()
    if expired.is_set():
        raise TimeoutError


def parse_key_set(body: bytes) -> dict[str, RSAPublicKey]:
    """
    The RS256 keys of a JWKS by their ids; keys of other types and uses are passed over.

    Raises:
        ValueError: if it is none, or holds no such key.

    Source: RFC 7517.
    """
    parsed = strict_json.parse(body)
    listed = parsed.get("keys") if isinstance(parsed, dict) else None
    found = (
        {jwk["kid"]: key for jwk in listed if (key := _parse_key(jwk)) is not None}
        if isinstance(listed, list)
        else {}
    )
    if not found:
        raise ValueError("no signing key in it")
    return found


def _parse_key(jwk: Any) -> RSAPublicKey | None:
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kid"), str):
        return None
    if (
        jwk.get("kty") != "RSA"
        or jwk.get("use", "sig") != "sig"
        or jwk.get("alg", "RS256") != "RS256"
    ):
        return None
    try:
        key = RSAAlgorithm.from_jwk({"kty": "RSA", "n": jwk.get("n"), "e": jwk.get("e")})
    except Exception:  # noqa: BLE001  # numbers that are none, in the many ways there are
        return None
    # OpenSSL fails on keys beyond its own limit instead of saying that a signature is false.
    return key if isinstance(key, RSAPublicKey) and 2048 <= key.key_size <= 8192 else None
