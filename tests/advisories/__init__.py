"""
The known mistakes of the field, one file each, named after it.

Each says where it bit whom, and commits the attack with real keys against what is verified in production.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from clerkhooks.clerk.session_tokens import SESSION_CATEGORY, SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import ConfiguredKeys, SigningKeys
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.errors import KeysUnavailable, Unauthenticated

CLERK, ATTACKER = PretendedClerk(), PretendedClerk()
RULES = TokenRules(f"https://{CLERK.frontend_api}", frozenset([CLERK.authorized_party]))


def sound_token(clerk: PretendedClerk = CLERK, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A session token that nothing is wrong with, but for these."""
    return clerk.session_token(clerk_id("user"), header=header, **claims)


def forged_token(header: Mapping[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """The claims of a sound token under a header and a signature of the attacker's making."""
    head = {"cat": SESSION_CATEGORY, "kid": "ins_pretended", "typ": "JWT", **header}
    signed = f"{base64url(json.dumps(head).encode())}.{sound_token().split('.')[1]}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def base64url(raw: bytes) -> str:
    """As tokens have it: without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refusal(token: str, keys: SigningKeys | None = None, rules: TokenRules = RULES) -> str | None:
    """Why a token is refused, or None where it holds."""
    keys = keys or ConfiguredKeys((CLERK.private_key.public_key(),))
    try:
        SessionVerifier(keys, rules).verify(token, time.time())
    except (Unauthenticated, KeysUnavailable) as error:
        return error.reason
    return None
