"""A fake Clerk instance that signs events and session tokens, for tests and ``dev``."""

from __future__ import annotations

import base64
import json
import secrets
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from clerkhooks.clerk.session_tokens import SESSION_CATEGORY
from clerkhooks.clerk.signatures import SigningSecret

if TYPE_CHECKING:
    from clerkhooks import payloads

BASE62 = string.digits + string.ascii_letters


def clerk_id(prefix: str) -> str:
    """Return a new id as Clerk would create it: prefix, underscore, 27 base-62 characters."""
    return f"{prefix}_" + "".join(secrets.choice(BASE62) for _ in range(27))


def derive_id(prefix: str, *parts: str) -> str:
    """Return an id like those of ``clerk_id`` that is the same for the same *parts*."""
    number = int.from_bytes(sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest())
    digits = (BASE62[number // 62**place % 62] for place in range(27))
    return f"{prefix}_" + "".join(digits)


@dataclass(frozen=True)
class FakeClerk:
    """A fake Clerk instance. Keys that are not passed are generated."""

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(24), repr=False)
    private_key: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(65537, 2048), repr=False
    )
    frontend_api: str = "clerk.example.com"
    authorized_party: str = "https://app.example.com"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that make a service trust this instance."""
        return {
            "CLERK_WEBHOOK_SECRET": "whsec_" + base64.b64encode(self.secret).decode(),
            "CLERK_JWT_KEY": self.public_key_pem,
            "CLERK_PUBLISHABLE_KEY": "pk_test_"
            + base64.b64encode(f"{self.frontend_api}$".encode()).decode(),
            "CLERK_AUTHORIZED_PARTIES": self.authorized_party,
        }

    @property
    def public_key_pem(self) -> str:
        """The JWT public key in PEM, the format that the Clerk Dashboard shows."""
        public = self.private_key.public_key()
        return public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    def headers(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> dict[str, str]:
        """
        Return Svix's headers for *body*. *timestamp* is in seconds.

        A retry has the same *message_id* and a new *timestamp*.
        """
        return svix_headers(SigningSecret(self.secret), body, message_id, timestamp)

    def session_token(
        self,
        user_id: str,
        *,
        header: dict[str, Any] | None = None,
        lifetime: int = 60,
        **claims: Any,
    ) -> str:
        """
        Return a session token (version 2) for *user_id* that expires after *lifetime* seconds.

        *header* and *claims* are added to the defaults. A claim of None is omitted.
        """
        now = int(time.time())
        payload = {
            "azp": self.authorized_party,
            "exp": now + lifetime,
            "fva": [1, -1],
            "iat": now,
            "iss": f"https://{self.frontend_api}",
            "jti": secrets.token_hex(10),
            "nbf": now - 10,
            "sid": clerk_id("sess"),
            "sts": "active",
            "sub": user_id,
            "v": 2,
        }
        payload |= claims
        payload = {name: value for name, value in payload.items() if value is not None}
        head = {"alg": "RS256", "cat": SESSION_CATEGORY, "kid": "ins_fake", "typ": "JWT"}
        parts = (head | (header or {}), payload)
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        signature = self.private_key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_base64url(signature)}"


def svix_headers(
    secret: SigningSecret, body: bytes, message_id: str | None = None, timestamp: int | None = None
) -> dict[str, str]:
    """Return Svix's headers for *body*, signed with *secret*. *timestamp* is in seconds."""
    message_id = clerk_id("msg") if message_id is None else message_id
    timestamp = int(time.time()) if timestamp is None else timestamp
    sent_at = datetime.fromtimestamp(timestamp, UTC)
    return {
        "Content-Type": "application/json",
        "svix-id": message_id,
        "svix-timestamp": str(timestamp),
        "svix-signature": secret.sign(message_id, sent_at, body.decode()),
    }


def user_data(
    user_id: str,
    *,
    email: str | None,
    first_name: str | None,
    last_name: str | None,
    updated_at: int,
) -> dict[str, Any]:
    """Return the complete ``data`` of a user event. *updated_at* is in milliseconds."""
    address_id = derive_id("idn", user_id, email or "")
    address: payloads.EmailAddress = {
        "created_at": updated_at,
        "email_address": email or "",
        "id": address_id,
        "linked_to": [],
        "object": "email_address",
        "reserved": False,
        "updated_at": updated_at,
        "verification": {
            "attempts": None,
            "expire_at": None,
            "status": "verified",
            "strategy": "ticket",
        },
    }
    data: payloads.User = {
        "backup_code_enabled": False,
        "banned": False,
        "create_organization_enabled": True,
        "created_at": updated_at,
        "delete_self_enabled": True,
        "deprovisioned": False,
        "email_addresses": [address] if email else [],
        "enterprise_accounts": [],
        "external_accounts": [],
        "external_id": None,
        "first_name": first_name,
        "has_image": True,
        "id": user_id,
        "image_url": f"https://img.clerk.com/{user_id}",
        "last_active_at": None,
        "last_name": last_name,
        "last_sign_in_at": None,
        "legal_accepted_at": None,
        "locked": False,
        "lockout_expires_in_seconds": None,
        "mfa_disabled_at": None,
        "mfa_enabled_at": None,
        "object": "user",
        "passkeys": [],
        "password_enabled": True,
        "phone_numbers": [],
        "primary_email_address_id": address_id if email else None,
        "primary_phone_number_id": None,
        "primary_web3_wallet_id": None,
        "private_metadata": {},
        "public_metadata": {},
        "saml_accounts": [],
        "totp_enabled": False,
        "two_factor_enabled": False,
        "unsafe_metadata": {},
        "updated_at": updated_at,
        "username": None,
        "verification_attempts_remaining": None,
        "web3_wallets": [],
    }
    return dict(data)


def event_body(event_type: str, data: Mapping[str, Any], timestamp: int) -> bytes:
    """Return the body of an event as Clerk sends it. *timestamp* is in milliseconds."""
    attributes = {"http_request": {"client_ip": "203.0.113.7", "user_agent": "Mozilla/5.0"}}
    envelope = {
        "data": data,
        "event_attributes": attributes,
        "instance_id": "ins_fake",
        "object": "event",
        "timestamp": timestamp,
        "type": event_type,
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
