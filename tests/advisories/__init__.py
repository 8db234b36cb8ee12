"""
Known vulnerabilities of token and webhook verification, one file for each mistake.

Each file cites where the mistake was exploited, and runs the attack with real keys against
production code.
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
    """Return the claims of a valid token with a header and a signature of the attacker's."""
    head = {"cat": SESSION_CATEGORY, "kid": "ins_fake", "typ": "JWT", **header}
    signed = f"{base64url(json.dumps(head).encode())}.{sound_token().split('.')[1]}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def base64url(raw: bytes) -> str:
    """Encode without padding, as tokens do."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refusal(token: str, keys: SigningKeys | None = None, rules: TokenRules = RULES) -> str | None:
    """Return why a token is refused, or None if it is valid."""
    keys = keys or ConfiguredKeys((CLERK.private_key.public_key(),))
    try:
        SessionVerifier(keys, rules).verify(token, time.time())
    except (Unauthenticated, KeysUnavailable) as error:
        return error.reason
    return None
