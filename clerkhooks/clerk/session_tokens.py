"""Verification of Clerk's session tokens, in the order: form, header, signature, claims."""

from __future__ import annotations

import base64
import binascii
import marshal
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, NewType

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.authorization import (
    MalformedClaims,
    Organization,
    Preset,
    Reverification,
    is_authorized,
    parse_factor_verification_age,
    parse_organization,
)
from clerkhooks.clerk.events import is_user_id
from clerkhooks.clerk.signing_keys import SigningKeys
from clerkhooks.errors import Unauthenticated

LEEWAY = 5  # seconds
LONGEST = 16 * 1024  # characters
LAST_SECOND = 253_402_300_799  # of the year 9999
SESSION_CATEGORY = "cl_B7d4PD111AAA"
ANY_CATEGORY = "cl_I7d4PD111III"  # instances that opted out of categories stamp it on every token
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)

Claims = NewType("Claims", Mapping[str, Any])
"""Claims of a token whose signature and claims have been verified."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say beside being sound. An empty or None rule is not enforced."""

    issuers: frozenset[str] = frozenset()
    authorized_parties: frozenset[str] = frozenset()
    audience: frozenset[str] = frozenset()
    native: bool = False  # a token without ``azp`` is admitted, unless it came in a cookie


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in session, as its verified token tells it."""

    id: str
    user_id: str
    claims: Claims

    @property
    def version(self) -> int:
        """The version of the claims: 2, or 1 where they name none."""
        return 2 if self.claims.get("v") == 2 else 1

    @property
    def organization(self) -> Organization | None:
        """The active organization, if there is one."""
        try:
            return parse_organization(self.claims)
        except MalformedClaims:
            return None

    @property
    def actor(self) -> Mapping[str, Any] | None:
        """The claims of whoever acts in the user's name, as ``sub``, where somebody does."""
        actor = self.claims.get("act")
        return actor if isinstance(actor, dict) else None

    @property
    def impersonated(self) -> bool:
        """Whether somebody else acts in the user's name. A claim of an odd shape counts: it is there for a reason."""
        return self.claims.get("act") is not None

    @property
    def status(self) -> str | None:
        """``active``, or None where the instance does not tell."""
        return self.claims.get("sts")

    @property
    def factor_verification_age(self) -> tuple[float, float] | None:
        """Minutes since the first and the second factor were verified; -1 for one that is not set up."""
        return parse_factor_verification_age(self.claims)

    def has(
        self,
        *,
        role: str | None = None,
        permission: str | None = None,
        feature: str | None = None,
        plan: str | None = None,
        reverification: Preset | Reverification | None = None,
    ) -> bool:
        """
        Whether the session meets every question that is asked: what Clerk's own ``has()`` says.

        A permission is ``org:feature:action``; a feature or plan may begin with ``org:`` or
        ``user:``.
        """
        questions = {
            "role": role,
            "permission": permission,
            "feature": feature,
            "plan": plan,
            "reverification": reverification,
        }
        return is_authorized(self.claims, **questions)  # type: ignore[arg-type]


class UnverifiedToken(NamedTuple):
    """The parts of a token's form. Nothing in it is proven."""

    unverified_header: Mapping[str, Any]
    unverified_payload: bytes
    signed: bytes
    signature: bytes


class SessionVerifier:
    """
    Verifies session tokens with *keys* and *rules*, and remembers those that held.

    A browser sends one token many times within its minute. To remember it is safe: the same text
    carries the same claims under the same signature, so only what depends on the time and on the
    keys may change. Expiry is checked at every use (``nbf`` and ``iat`` once, for time goes on),
    and an entry counts only for the generation of keys that it was verified with. What is kept is
    the digest of the token and its claims in bytes, read anew for each use, so that no caller
    changes another's. Only tokens that held are remembered, the newest *remember* of them, so that
    a forger fills nothing.
    """

    def __init__(self, keys: SigningKeys, rules: TokenRules, remember: int = 4096) -> None:
        self.keys, self._rules, self._limit = keys, rules, remember
        self._remembered: dict[bytes, tuple[int | None, int, bytes]] = {}
        self._guard = threading.Lock()

    def verify(self, token: str, now: float, *, in_cookie: bool = False) -> Session:
        """
        Return the session that *token* proves; *now* in seconds since the epoch.

        A token *in_cookie* always needs an ``azp``, if authorized parties are configured.

        Raises:
            Unauthenticated: with the reason, for every token that does not hold.
            KeysUnavailable: if there is no key to verify it with.

        Source: Clerk, "Manual JWT verification"; the checks of @clerk/backend 3.25, and stricter
        where it is lax.
        """
        if len(token) > LONGEST:
            raise Unauthenticated("token_too_long")
        generation, digest = (
            self.keys.refresh_if_due(),
            sha256(token.encode("utf-8", "replace")).digest(),
        )
        held_in, expiry, frozen = self._remembered.get(digest, (None, 0, b""))
        if held_in is not None and held_in == generation and expiry > now - LEEWAY:
            claims = marshal.loads(frozen)  # noqa: S302  # our own bytes, which never left this process
            verify_authorized_party(claims, self._rules, in_cookie=in_cookie)
            return _session(claims)
        unverified = parse_form(token)
        verify_header(unverified.unverified_header)
        verify_signature(unverified, self.keys.find(unverified.unverified_header.get("kid")))
        claims = parse_claims(unverified.unverified_payload)
        session = verify_claims(claims, self._rules, now, in_cookie=in_cookie)
        with suppress(
            ValueError
        ):  # claims nested too deeply for marshal, which is thrice as fast as JSON
            self._remember(digest, (generation, int(claims["exp"]), marshal.dumps(claims)))
        return session

    def _remember(self, digest: bytes, entry: tuple[int | None, int, bytes]) -> None:
        with self._guard:
            self._remembered.pop(digest, None)
            self._remembered[digest] = entry
            if len(self._remembered) > self._limit:
                del self._remembered[next(iter(self._remembered))]


def verify_claims(
    claims: dict[str, Any], rules: TokenRules, now: float, *, in_cookie: bool = False
) -> Session:
    """
    The session of a token whose signature holds, once each of its claims does.

    Raises:
        Unauthenticated: with the reason, for the first that does not.
    """
    verify_subject(claims)
    verify_session_id(claims)
    verify_expiry(claims, now)
    verify_not_before(claims, now)
    verify_issued_at(claims, now)
    verify_issuer(claims, rules.issuers)
    verify_audience(claims, rules.audience)
    verify_authorized_party(claims, rules, in_cookie=in_cookie)
    verify_status(claims)
    return _session(claims)


def parse_form(token: str) -> UnverifiedToken:
    """Three parts of canonical base64url, the first a JSON object."""
    form = _FORM.fullmatch(token)
    if form is None:
        raise Unauthenticated("token_malformed")
    header, payload, signature = map(_decode_base64url, form.groups())
    return UnverifiedToken(_parse_object(header), payload, token[: form.end(2)].encode(), signature)


def verify_header(header: Mapping[str, Any]) -> None:
    """Only a session token's marks: an OAuth access token, a template's or a machine's is signed by the same key."""
    if header.get("typ", "JWT") != "JWT":
        raise Unauthenticated("token_type_mismatch")
    if header.get("alg") != "RS256":
        raise Unauthenticated("token_algorithm_refused")
    if header.get("cat", SESSION_CATEGORY) not in (SESSION_CATEGORY, ANY_CATEGORY):
        raise Unauthenticated("token_category_mismatch")
    if "crit" in header:  # RFC 7515, 4.1.11: what is critical and not understood is refused
        raise Unauthenticated("token_header_critical")


def verify_signature(token: UnverifiedToken, keys: Sequence[RSAPublicKey]) -> None:
    """RS256 by one of *keys*; a key that the token brings along is never looked at."""
    if not any(_RS256.verify(token.signed, key, token.signature) for key in keys):
        raise Unauthenticated("token_signature_mismatch")


def parse_claims(payload: bytes) -> dict[str, Any]:
    """The claims, which must be a JSON object."""
    return _parse_object(payload)


def verify_subject(claims: Mapping[str, Any]) -> None:
    """``sub`` is a Clerk user id; a machine's begins with ``mch_``."""
    if not is_user_id(claims.get("sub")):
        raise Unauthenticated("token_subject_malformed")


def verify_session_id(claims: Mapping[str, Any]) -> None:
    """``sid`` is there: a token made from a template lacks it, and outlives the session's end."""
    sid = claims.get("sid")
    if not isinstance(sid, str) or not sid:
        raise Unauthenticated("token_session_missing")


def verify_expiry(claims: Mapping[str, Any], now: float) -> None:
    """``exp`` is there and not past."""
    if _seconds(claims, "exp") <= now - LEEWAY:
        raise Unauthenticated("token_expired")


def verify_not_before(claims: Mapping[str, Any], now: float) -> None:
    """``nbf``, where there is one, is not ahead."""
    if "nbf" in claims and _seconds(claims, "nbf") > now + LEEWAY:
        raise Unauthenticated("token_not_active_yet")


def verify_issued_at(claims: Mapping[str, Any], now: float) -> None:
    """``iat`` is there and not ahead."""
    if _seconds(claims, "iat") > now + LEEWAY:
        raise Unauthenticated("token_issued_in_the_future")


def verify_issuer(claims: Mapping[str, Any], issuers: frozenset[str]) -> None:
    """``iss`` is our instance, where it is known: a key may be shared between instances."""
    iss = claims.get("iss")
    if issuers and not (isinstance(iss, str) and iss in issuers):
        raise Unauthenticated("token_issuer_mismatch")


def verify_audience(claims: Mapping[str, Any], audience: frozenset[str]) -> None:
    """One ``aud`` is ours, where an audience is configured and the token has one."""
    aud = claims.get("aud")
    if not audience or aud in (None, "", []):
        return
    if audience.isdisjoint(
        value for value in (aud if isinstance(aud, list) else [aud]) if isinstance(value, str)
    ):
        raise Unauthenticated("token_audience_mismatch")


def verify_authorized_party(
    claims: Mapping[str, Any], rules: TokenRules, *, in_cookie: bool
) -> None:
    """``azp`` is one of ours: otherwise a subdomain that was taken over could use its visitors' tokens."""
    azp = claims.get("azp")
    if not (rules.authorized_parties or rules.native):
        return
    if "azp" not in claims:
        # Native apps, and tokens made by the Backend API, have none. A browser's cookie always has.
        if in_cookie or not rules.native:
            raise Unauthenticated("token_authorized_party_missing")
    elif not (isinstance(azp, str) and azp in rules.authorized_parties):
        raise Unauthenticated("token_authorized_party_mismatch")


def verify_status(claims: Mapping[str, Any]) -> None:
    """``sts`` is absent or active; a pending session has tasks left and counts as signed out."""
    if claims.get("sts", "active") != "active":
        raise Unauthenticated(
            "session_pending" if claims["sts"] == "pending" else "session_status_unknown"
        )


def _session(claims: dict[str, Any]) -> Session:
    return Session(claims["sid"], claims["sub"], Claims(claims))


def _decode_base64url(part: str) -> bytes:
    # Python drops stray bits at the end, so that many texts would stand for one signature.
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        raise Unauthenticated("token_malformed") from None
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != part:
        raise Unauthenticated("token_malformed")
    return raw


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(raw)
    except ValueError:
        raise Unauthenticated("token_malformed") from None
    if not isinstance(value, dict):
        raise Unauthenticated("token_malformed")
    return value


def _seconds(claims: Mapping[str, Any], name: str) -> int:
    """A NumericDate cut to whole seconds, as JavaScript does. PyJWT would take a string, too."""
    value = claims.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= LAST_SECOND
    ):
        raise Unauthenticated(f"token_{name}_malformed")
    return int(value)
