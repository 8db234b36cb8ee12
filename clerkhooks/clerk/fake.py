"""A fake Clerk instance, which signs events and session tokens with keys of its own."""

from __future__ import annotations

import base64
import json
import secrets
import string
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from clerkhooks.clerk.session_tokens import SESSION_CATEGORY
from clerkhooks.clerk.signatures import SigningSecret

BASE62 = string.digits + string.ascii_letters


def clerk_id(prefix: str) -> str:
    """A new id as Clerk forms them: prefix, underscore, 27 base-62 characters."""
    return f"{prefix}_" + "".join(secrets.choice(BASE62) for _ in range(27))


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@dataclass(frozen=True)
class FakeClerk:
    """The keys of one instance. Made anew each time, they open nothing but what is configured with them."""

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(24), repr=False)
    private_key: rsa.RSAPrivateKey = field(default_factory=_new_key, repr=False)
    frontend_api: str = "clerk.example.com"
    authorized_party: str = "https://app.example.com"

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which a service trusts this instance."""
        return {
            "CLERK_WEBHOOK_SECRET": "whsec_" + base64.b64encode(self.secret).decode(),
            "CLERK_JWT_KEY": self.public_key_pem,
            "CLERK_PUBLISHABLE_KEY": "pk_test_"
            + base64.b64encode(f"{self.frontend_api}$".encode()).decode(),
            "CLERK_AUTHORIZED_PARTIES": self.authorized_party,
        }

    @property
    def public_key_pem(self) -> str:
        """What the dashboard calls the JWT public key."""
        public = self.private_key.public_key()
        return public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    def headers(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> dict[str, str]:
        """Svix's headers for *body*. A retry keeps *message_id* and takes a new *timestamp* (seconds)."""
        return svix_headers(SigningSecret(self.secret), body, message_id, timestamp)

    def session_token(
        self,
        user_id: str,
        *,
        header: dict[str, Any] | None = None,
        lifetime: int = 60,
        **claims: Any,
    ) -> str:
        """A session token (version 2) of *user_id*, good for *lifetime* seconds. A claim given as None is left out."""
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
        payload = {name: value for name, value in (payload | claims).items() if value is not None}
        head = {"alg": "RS256", "cat": SESSION_CATEGORY, "kid": "ins_fake", "typ": "JWT"} | (
            header or {}
        )
        signed = (
            f"{_base64url(json.dumps(head).encode())}.{_base64url(json.dumps(payload).encode())}"
        )
        signature = self.private_key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_base64url(signature)}"


def svix_headers(
    secret: SigningSecret, body: bytes, message_id: str | None = None, timestamp: int | None = None
) -> dict[str, str]:
    """Svix's headers for *body*, signed with *secret*; *timestamp* in seconds."""
    message_id = clerk_id("msg") if message_id is None else message_id
    timestamp = int(time.time()) if timestamp is None else timestamp
    signature = secret.sign(message_id, timestamp, body.decode())
    return {
        "Content-Type": "application/json",
        "svix-id": message_id,
        "svix-timestamp": str(timestamp),
        "svix-signature": f"v1,{signature}",
    }


def user_data(
    user_id: str,
    *,
    email: str | None,
    first_name: str | None,
    last_name: str | None,
    updated_at: int,
) -> dict[str, Any]:
    """The ``data`` of a user event, with the fields that Clerk sends. *updated_at* in milliseconds."""
    address_id = clerk_id("idn")
    verification = {"attempts": None, "expire_at": None, "status": "verified", "strategy": "ticket"}
    address: dict[str, Any] = {
        "email_address": email,
        "id": address_id,
        "linked_to": [],
        "object": "email_address",
    }
    address["verification"] = verification
    return {
        "backup_code_enabled": False,
        "banned": False,
        "created_at": updated_at,
        "email_addresses": [address] if email else [],
        "external_accounts": [],
        "external_id": None,
        "first_name": first_name,
        "has_image": True,
        "id": user_id,
        "image_url": f"https://img.clerk.com/{user_id}",
        "last_name": last_name,
        "last_sign_in_at": None,
        "locked": False,
        "object": "user",
        "password_enabled": True,
        "phone_numbers": [],
        "primary_email_address_id": address_id if email else None,
        "primary_phone_number_id": None,
        "private_metadata": {},
        "public_metadata": {},
        "two_factor_enabled": False,
        "unsafe_metadata": {},
        "updated_at": updated_at,
        "username": None,
        "web3_wallets": [],
    }


def event_body(event_type: str, data: dict[str, Any], timestamp: int) -> bytes:
    """The body of an event as Clerk sends it. *timestamp* in milliseconds."""
    attributes = {"http_request": {"client_ip": "203.0.113.7", "user_agent": "Mozilla/5.0"}}
    envelope = {
        "data": data,
        "event_attributes": attributes,
        "instance_id": "ins_fake",
        "object": "event",
    }
    return json.dumps(
        envelope | {"timestamp": timestamp, "type": event_type}, separators=(",", ":")
    ).encode()


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
