"""The keys that verify session tokens. They are configured or fetched from Clerk."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.download import download
from clerkhooks.errors import KeysUnavailable, Unauthenticated, describe

logger = logging.getLogger(__name__)
TIMEOUT = 3.0  # the timeout in seconds, for a fetch and for waiting until a fetch ends
BRIEF_TIMEOUT = 0.5  # in seconds; a working issuer responds sooner
MAX_ANSWER = 256 * 1024  # in bytes; Clerk's response is about 2 kB
REFRESH_AFTER = 5 * 60.0  # seconds
COOLDOWN = 30.0  # seconds between the starts of two fetches, even if the first one fails or hangs
KEEP_FOR = 12 * 3600.0  # seconds that keys stay in use without another successful fetch


@dataclass(frozen=True)
class ConfiguredKeys:
    """Keys from the configuration. All of them are tried; the token's ``kid`` is ignored."""

    keys: tuple[RSAPublicKey, ...]

    def require_any(self) -> None:
        """Raise KeysUnavailable if no key is configured."""
        if not self.keys:
            raise KeysUnavailable("keys_not_configured", retry_after=300)

    def find(self, kid: object) -> Sequence[RSAPublicKey]:
        """Return all keys."""
        self.require_any()
        return self.keys


@dataclass
class FetchedKeys:
    """
    The keys at *url*, cached for one process.

    Lookups of known keys never wait. Fetches run in a separate thread, at most one per cooldown
    (single flight), so forged tokens cannot flood Clerk with requests. The known keys stay in use
    until a valid key set replaces them or *keep_for* seconds have passed.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    keep_for: float = KEEP_FOR
    cooldown: float = COOLDOWN
    on_fetch: Callable[[bool], object] = field(default=lambda _ok: None, repr=False)

    def __post_init__(self) -> None:
        self._guard = threading.Lock()
        self._keys: Mapping[str, RSAPublicKey] = {}
        self._fetched_at = self._tried_at = -math.inf
        self._fetch: threading.Thread | None = None

    @property
    def age(self) -> float | None:
        """Seconds since the last successful fetch, or None if no fetch has succeeded."""
        return time.monotonic() - self._fetched_at if self._keys else None

    def find(self, kid: object) -> Sequence[RSAPublicKey]:
        """
        Return the key with the id *kid*. An unknown id causes a fetch.

        There is at most one fetch per cooldown.

        Raises:
            Unauthenticated: ``unknown_key``.
            KeysUnavailable: no usable key is known.
        """
        if time.monotonic() - self._fetched_at >= REFRESH_AFTER:
            self.fetch_soon()
        self.require_any()
        name = kid if isinstance(kid, str) else ""
        if name not in self._usable():
            self._wait_for_fetch()
        key = self._usable().get(name)
        if key is None:
            raise Unauthenticated("unknown_key")
        return (key,)

    def require_any(self) -> None:
        """If no usable key is known, wait for a fetch. If it fails, raise KeysUnavailable."""
        if not self._usable():
            self._wait_for_fetch()
        if not self._usable():
            retry_after = max(1, math.ceil(self._tried_at + self.cooldown - time.monotonic()))
            raise KeysUnavailable("keys_unavailable", retry_after)

    def _wait_for_fetch(self) -> None:
        # If a fetch is running, wait for it instead of starting another. While keys are known, only
        # the thread that started the fetch waits for the full timeout. Otherwise, forged tokens
        # could occupy every thread.
        fetch, is_ours = self._start_or_join()
        if fetch is not None:
            fetch.join(TIMEOUT if is_ours or not self._usable() else BRIEF_TIMEOUT)

    def fetch_soon(self) -> threading.Thread | None:
        """Start a fetch unless one began within the cooldown. Return the latest fetch."""
        return self._start_or_join()[0]

    def _start_or_join(self) -> tuple[threading.Thread | None, bool]:
        """Return the latest fetch, running or ended, and whether this call started it."""
        with self._guard:
            if time.monotonic() < self._tried_at + self.cooldown:
                return self._fetch, False
            fetch = threading.Thread(target=self._fetch_now, name="signing-keys", daemon=True)
            self._tried_at, self._fetch = time.monotonic(), None
            # start() raises an error if the system cannot create a thread. The known keys stay in
            # use.
            with suppress(RuntimeError):
                fetch.start()
                self._fetch = fetch
            return self._fetch, True

    def _usable(self) -> Mapping[str, RSAPublicKey]:
        return self._keys if time.monotonic() - self._fetched_at < self.keep_for else {}

    def _fetch_now(self) -> None:
        try:
            keys = fetch_key_set(self.url, self.headers)
        except Exception as error:  # noqa: BLE001  # an endpoint may return anything
            self.on_fetch(False)
            logger.warning(
                "signing_keys_not_fetched",
                extra={"error": describe(error), "keys_known": len(self._usable())},
            )
            return
        with self._guard:
            # A fetch that hangs may end after a later fetch, and return older keys.
            is_current = self._fetch is threading.current_thread()
            if is_current:
                self._keys = keys  # set before _fetched_at, which other threads read first
                self._fetched_at = time.monotonic()
        self.on_fetch(is_current)


SigningKeys = ConfiguredKeys | FetchedKeys
"""A verifier's source of keys."""


def fetch_key_set(url: str, headers: Mapping[str, str]) -> dict[str, RSAPublicKey]:
    """
    Return the RS256 keys of the JWKS at *url* by key id. Other keys are skipped.

    Raises:
        ValueError: the status is not 200, or the body is not a JWKS with an RS256 key.
        TimeoutError, httpx.HTTPError, UnusableAnswer: no usable response arrived in time.

    Source: RFC 7517.
    """
    answer = download(url, headers, timeout=TIMEOUT, max_size=MAX_ANSWER)
    if answer.status != 200:
        raise ValueError("not answered with 200")
    parsed = strict_json.parse(answer.body)
    listed = parsed.get("keys") if isinstance(parsed, dict) else None
    listed = listed if isinstance(listed, list) else []
    found = {jwk["kid"]: key for jwk in listed if (key := _parse_key(jwk)) is not None}
    if not found:
        raise ValueError("no signing key in it")
    return found


def _parse_key(jwk: Any) -> RSAPublicKey | None:
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kid"), str):
        return None
    marks = (jwk.get("kty"), jwk.get("use", "sig"), jwk.get("alg", "RS256"))
    if marks != ("RSA", "sig", "RS256"):
        return None
    try:
        key = RSAAlgorithm.from_jwk({"kty": "RSA", "n": jwk.get("n"), "e": jwk.get("e")})
    except Exception:  # noqa: BLE001  # malformed numbers raise many kinds of errors
        return None
    # With larger keys, OpenSSL raises an error instead of reporting an invalid signature.
    return key if isinstance(key, RSAPublicKey) and 2048 <= key.key_size <= 8192 else None
