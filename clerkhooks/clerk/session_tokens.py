"""Verification of Clerk's session tokens, in this order: form, header, signature, claims."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NewType, Unpack

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.authorization import (
    Conditions,
    MalformedClaims,
    Organization,
    is_authorized,
    parse_factor_ages,
    parse_organization,
)
from clerkhooks.clerk.kinds import USER
from clerkhooks.clerk.signing_keys import SigningKeys
from clerkhooks.errors import Unauthenticated

LEEWAY = 5  # seconds
MAX_LENGTH = 16 * 1024  # characters
MAX_KNOWN = 1000  # tokens whose signature is not verified again
LAST_SECOND = 253_402_300_799  # the end of the year 9999
SESSION_CATEGORY = "cl_B7d4PD111AAA"
ANY_CATEGORY = "cl_I7d4PD111III"  # in every token of an instance that opted out of categories
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)

Claims = NewType("Claims", Mapping[str, Any])
"""The claims of a token, after its signature and claims have been verified."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The configured rules for tokens. An empty rule is not enforced."""

    issuers: frozenset[str] = frozenset()
    authorized_parties: frozenset[str] = frozenset()
    audience: frozenset[str] = frozenset()
    native: bool = False
    """Whether a token without ``azp`` is accepted, unless it came in a cookie."""


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in session, as described by its verified token."""

    id: str
    user_id: str
    claims: Claims

    @property
    def organization(self) -> Organization | None:
        """The active organization, or None if the claims about it are missing or malformed."""
        try:
            return parse_organization(self.claims)
        except MalformedClaims:
            return None

    @property
    def actor(self) -> Mapping[str, Any] | None:
        """The claims about the impersonator, or None if the user is not being impersonated."""
        actor = self.claims.get("act")
        return actor if isinstance(actor, dict) else None

    @property
    def impersonated(self) -> bool:
        """Whether someone is impersonating the user. A malformed ``act`` claim counts too."""
        return self.claims.get("act") is not None

    @property
    def factor_verification_age(self) -> tuple[float, float] | None:
        """Minutes since each factor was verified; -1 for a factor that is not set up."""
        return parse_factor_ages(self.claims)

    def has(self, **conditions: Unpack[Conditions]) -> bool:
        """
        Return whether the session meets every condition, as Clerk's own ``has()`` does.

        A permission has the form ``org:feature:action``. A feature or plan may begin with ``org:``
        or ``user:``.

        Raises:
            TypeError: the name of a condition is unknown.
        """
        return is_authorized(self.claims, **conditions)


class UnverifiedToken(NamedTuple):
    """The decoded parts of a token, before any of them is verified."""

    unverified_header: Mapping[str, Any]
    unverified_payload: bytes
    signed: bytes
    signature: bytes


class KnownToken(NamedTuple):
    """The payload of a token whose signature has been verified with *key*."""

    kid: object
    key: RSAPublicKey
    payload: bytes


@dataclass(frozen=True, slots=True)
class SessionVerifier:
    """
    Verifies session tokens with *keys* and *rules*.

    A client sends the same token for up to a minute. Its signature is verified once, and again if
    its key is no longer in use. Its claims are verified each time.
    """

    keys: SigningKeys
    rules: TokenRules
    _known: dict[str, KnownToken] = field(default_factory=dict, repr=False, compare=False)

    def verify(self, token: str, now: float, *, in_cookie: bool = False) -> Session:
        """
        Verify *token* and return its session. *now* is in seconds since the epoch.

        A token from a cookie must have an ``azp`` if authorized parties are configured.

        Raises:
            Unauthenticated: the token is not valid. ``reason`` names the failed check.
            KeysUnavailable: no key is available to verify the token.

        Source: Clerk, "Manual JWT verification". Every token that @clerk/backend 3.25 rejects is
        rejected here too.
        """
        if len(token) > MAX_LENGTH:
            raise Unauthenticated("token_too_long")
        known = self._known.get(token)
        if known is None or known.key not in self.keys.find(known.kid):
            known = self._verify_signature(token)
        claims = _parse_object(known.payload)  # parsed each time, because a view may change them
        verify_claims(claims, self.rules, now, in_cookie=in_cookie)
        return Session(claims["sid"], claims["sub"], Claims(claims))

    def _verify_signature(self, token: str) -> KnownToken:
        unverified = parse_form(token)
        header = unverified.unverified_header
        verify_header(header)
        key = verify_signature(unverified, self.keys.find(header.get("kid")))
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        known = KnownToken(header.get("kid"), key, unverified.unverified_payload)
        self._known[token] = known
        return known


def parse_form(token: str) -> UnverifiedToken:
    """
    Decode the three parts of *token*. They must be canonical base64url.

    The header must be a JSON object. PyJWT's parser accepts padding, NaN and headers in UTF-16,
    which Clerk's SDK rejects.

    Raises:
        Unauthenticated: ``token_malformed``.
    """
    form = _FORM.fullmatch(token)
    if form is None:
        raise Unauthenticated("token_malformed")
    header, payload, signature = map(_decode_base64url, form.groups())
    return UnverifiedToken(_parse_object(header), payload, token[: form.end(2)].encode(), signature)


def verify_header(header: Mapping[str, Any]) -> None:
    """
    Require that *header* belongs to a session token that is signed with RS256.

    OAuth, template and machine tokens may be signed with the same key. They are rejected, because
    their type or category is different.
    """
    _require(header.get("typ", "JWT") == "JWT", "token_type_mismatch")
    _require(header.get("alg") == "RS256", "token_algorithm_refused")
    category = header.get("cat", SESSION_CATEGORY)
    _require(category in (SESSION_CATEGORY, ANY_CATEGORY), "token_category_mismatch")
    # RFC 7515, 4.1.11: a token with an unknown critical parameter must be rejected.
    _require("crit" not in header, "token_header_critical")


def verify_signature(token: UnverifiedToken, keys: Sequence[RSAPublicKey]) -> RSAPublicKey:
    """Return the one of *keys* that verifies RS256. A key in the token's header is never used."""
    for key in keys:
        if _RS256.verify(token.signed, key, token.signature):
            return key
    raise Unauthenticated("token_signature_mismatch")


def verify_claims(
    claims: Mapping[str, Any], rules: TokenRules, now: float, *, in_cookie: bool = False
) -> None:
    """
    Verify each claim of a token whose signature is valid.

    Raises:
        Unauthenticated: a claim is not valid. ``reason`` names the first such claim.
    """
    # The subject of a machine token begins with mch_. A template token has no sid, and may outlive
    # the session.
    _require(USER.is_id(claims.get("sub")), "token_subject_malformed")
    _require(isinstance(claims.get("sid"), str) and claims["sid"] != "", "token_session_missing")
    _require(_parse_seconds(claims, "exp") > now - LEEWAY, "token_expired")
    if "nbf" in claims:
        _require(_parse_seconds(claims, "nbf") <= now + LEEWAY, "token_not_active_yet")
    _require(_parse_seconds(claims, "iat") <= now + LEEWAY, "token_issued_in_the_future")
    if rules.issuers:  # several instances may share a signing key
        _require(_is_one_of(claims.get("iss"), rules.issuers), "token_issuer_mismatch")
    if rules.audience and claims.get("aud") not in (None, "", []):
        _require(_has_audience(claims["aud"], rules.audience), "token_audience_mismatch")
    if rules.authorized_parties or rules.native:
        verify_authorized_party(claims, rules, in_cookie=in_cookie)
    status = claims.get("sts", "active")  # a pending session counts as signed out
    _require(status != "pending", "session_pending")
    _require(status == "active", "session_status_unknown")


def verify_authorized_party(
    claims: Mapping[str, Any], rules: TokenRules, *, in_cookie: bool
) -> None:
    """Require an authorized ``azp``, so that a hijacked subdomain cannot use visitors' tokens."""
    if "azp" in claims:
        is_ours = _is_one_of(claims["azp"], rules.authorized_parties)
        _require(is_ours, "token_authorized_party_mismatch")
    else:
        # Tokens from native apps and the Backend API have no azp. Cookies from browsers have one.
        _require(rules.native and not in_cookie, "token_authorized_party_missing")


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise Unauthenticated(reason)


def _is_one_of(value: object, allowed: frozenset[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _has_audience(aud: object, audience: frozenset[str]) -> bool:
    values = aud if isinstance(aud, list) else [aud]
    return any(_is_one_of(value, audience) for value in values)


def _decode_base64url(part: str) -> bytes:
    # Python ignores stray bits at the end, so several encodings of a signature would be accepted.
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


def _parse_seconds(claims: Mapping[str, Any], name: str) -> int:
    """Return the claim *name* in whole seconds, truncated as in JavaScript. Reject strings."""
    value = claims.get(name)
    if not strict_json.is_number(value) or not abs(value) <= LAST_SECOND:  # also rejects NaN
        raise Unauthenticated(f"token_{name}_malformed")
    return int(value)
