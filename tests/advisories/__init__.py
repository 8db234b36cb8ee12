"""
Known vulnerabilities in the verification of tokens and webhooks, one per file.

Each file names the software that is or was affected, and runs the attack with real keys against the
code of clerkhooks.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.session_tokens import SESSION_CATEGORY, SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import ConfiguredKeys, SigningKeys
from clerkhooks.errors import KeysUnavailable, Unauthenticated

CLERK, ATTACKER = FakeClerk(), FakeClerk()
RULES = TokenRules(
    frozenset([f"https://{CLERK.frontend_api}"]), frozenset([CLERK.authorized_party])
)


def sound_token(
    clerk: FakeClerk = CLERK, header: dict[str, Any] | None = None, **claims: Any
) -> str:
    """Return a session token that is valid except for *header* and *claims*."""
    return clerk.session_token(clerk_id("user"), header=header, **claims)


def forged_token(header: Mapping[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """Return a token with valid claims, but with the attacker's header and signature."""
    head = {"cat": SESSION_CATEGORY, "kid": "ins_fake", "typ": "JWT", **header}
    signed = f"{base64url(json.dumps(head).encode())}.{sound_token().split('.')[1]}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def base64url(raw: bytes) -> str:
    """Encode *raw* in URL-safe base64 without padding, as in a token."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refusal(token: str, keys: SigningKeys | None = None, rules: TokenRules = RULES) -> str | None:
    """Return the reason why a token is refused, or None if the token is valid."""
    keys = keys or ConfiguredKeys((CLERK.private_key.public_key(),))
    try:
        SessionVerifier(keys, rules).verify(token, time.time())
    except (Unauthenticated, KeysUnavailable) as error:
        return error.reason
    return None
