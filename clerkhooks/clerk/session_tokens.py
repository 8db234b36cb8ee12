"""Verification of Clerk's session tokens, in the order: form, header, signature, claims."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.events import is_user_id
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

    issuer: str | None = None
    authorized_parties: frozenset[str] = frozenset()
    audience: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in session. *actor* holds the impersonator's claims, where there is one."""

    id: str
    user_id: str
    actor: Mapping[str, Any] | None
    claims: Claims

    @property
    def impersonated(self) -> bool:
        """Whether somebody else acts in the user's name. A claim of an odd shape counts: it is there for a reason."""
        return self.claims.get("act") is not None


class UnverifiedToken(NamedTuple):
    """The parts of a token's form. Nothing in it is proven."""

    unverified_header: Mapping[str, Any]
    unverified_payload: bytes
    signed: bytes
    signature: bytes


def verify_session_token(token: str, keys: Sequence[RSAPublicKey], rules: TokenRules, now: float) -> Session:
    """
    The session that *token* proves under one of *keys*; *now* in seconds since the epoch.

    Raises:
        Unauthenticated: with the reason, for every token that does not hold.

    Source: Clerk, "Manual JWT verification"; the checks of @clerk/backend 3.25, and stricter where it is lax.
    """
    unverified = parse_form(token)
    verify_header(unverified.unverified_header)
    verify_signature(unverified, keys)
    claims = parse_claims(unverified.unverified_payload)
    verify_subject(claims)
    verify_session_id(claims)
    verify_expiry(claims, now)
    verify_not_before(claims, now)
    verify_issued_at(claims, now)
    verify_issuer(claims, rules.issuer)
    verify_audience(claims, rules.audience)
    verify_authorized_party(claims, rules.authorized_parties)
    verify_status(claims)
    actor = claims.get("act")
    return Session(claims["sid"], claims["sub"], actor if isinstance(actor, dict) else None, Claims(claims))


def parse_form(token: str) -> UnverifiedToken:
    """Three parts of canonical base64url, the first a JSON object, in 16 KiB at most."""
    if len(token) > LONGEST:
        raise Unauthenticated("token_too_long")
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


def verify_issuer(claims: Mapping[str, Any], issuer: str | None) -> None:
    """``iss`` is our instance, where it is known: a key may be shared between instances."""
    if issuer is not None and claims.get("iss") != issuer:
        raise Unauthenticated("token_issuer_mismatch")


def verify_audience(claims: Mapping[str, Any], audience: frozenset[str]) -> None:
    """One ``aud`` is ours, where an audience is configured and the token has one."""
    aud = claims.get("aud")
    if not audience or aud in (None, "", []):
        return
    if audience.isdisjoint(value for value in (aud if isinstance(aud, list) else [aud]) if isinstance(value, str)):
        raise Unauthenticated("token_audience_mismatch")


def verify_authorized_party(claims: Mapping[str, Any], authorized_parties: frozenset[str]) -> None:
    """``azp`` is there and one of ours: else a subdomain that was taken over could use its visitors' tokens."""
    azp = claims.get("azp")
    if authorized_parties and not (isinstance(azp, str) and azp in authorized_parties):
        raise Unauthenticated("token_authorized_party_mismatch")


def verify_status(claims: Mapping[str, Any]) -> None:
    """``sts`` is absent or active; a pending session has tasks left and counts as signed out."""
    if claims.get("sts", "active") != "active":
        raise Unauthenticated("session_pending" if claims["sts"] == "pending" else "session_status_unknown")


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
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LAST_SECOND:
        raise Unauthenticated(f"token_{name}_malformed")
    return int(value)
