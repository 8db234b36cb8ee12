"""Verification of webhooks signed by Svix."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

# svix.webhooks only wraps this class. Importing svix would also load its API client, which takes
# 16 MB and 0.2 s per process.
from standardwebhooks.webhooks import Webhook

from clerkhooks.errors import SignatureError

HEADERS = ("svix-id", "svix-timestamp", "svix-signature")
TOLERANCE = 5 * 60  # seconds
SigningSecret = Webhook
"""An endpoint's signing secret. Its repr does not show the secret."""
_SECONDS = re.compile(r"[0-9]{1,12}")
# The characters that JavaScript's trim() removes. Python's strip() removes more by default.
_BLANKS = " \t\n\v\f\r\xa0\ufeff"


@dataclass(frozen=True, slots=True)
class VerifiedMessage:
    """A message that Clerk sent. *attempt_timestamp* (seconds) changes with every retry."""

    message_id: str
    attempt_timestamp: int
    body: str


def verify_signature(
    headers: Mapping[str, str], body: bytes, secrets: Sequence[SigningSecret], now: float
) -> VerifiedMessage:
    """
    Return the message if one of its signatures matches one of *secrets*.

    The names in *headers* are in lower case. *now* is in seconds since the epoch.

    Raises:
        SignatureError: the message cannot be verified. ``reason`` names the failed check.

    Source: Standard Webhooks 1.0, "Verifying webhook authenticity". The results are the same as in
    @clerk/backend 3.25.
    """
    message_id, timestamp, signatures = (headers.get(name, "").strip(_BLANKS) for name in HEADERS)
    if not (message_id and timestamp and signatures):
        raise SignatureError("signature_headers_missing")
    # Digits only: Python also reads "1e3", "NaN" and "1_000" as numbers, which Svix never sends.
    if not _SECONDS.fullmatch(timestamp):
        raise SignatureError("timestamp_malformed")
    attempt_timestamp = int(timestamp)
    if abs(int(now) - attempt_timestamp) > TOLERANCE:
        raise SignatureError("timestamp_out_of_tolerance")
    try:
        # The signature covers this exact text, not JSON that was parsed and serialized again.
        text, sent_at = body.decode(), datetime.fromtimestamp(attempt_timestamp, UTC)
        expected = [secret.sign(message_id, sent_at, text).encode() for secret in secrets]
    except UnicodeError:
        raise SignatureError("body_not_utf8") from None
    # The library's verify() decodes base64 leniently, raises at the first garbled signature, and
    # takes no time argument. Therefore the library only signs, and the signatures are compared as
    # text, as in Clerk's SDK. All pairs are compared, so that the duration does not reveal which
    # secret and signature match.
    sent = _parse_signatures(signatures)
    matches = [hmac.compare_digest(one, other) for one in sent for other in expected]
    if not any(matches):
        raise SignatureError("signature_mismatch")
    return VerifiedMessage(message_id, attempt_timestamp, text)


def _parse_signatures(header: str) -> list[bytes]:
    """Return the v1 signatures in *header*. Skip other versions and garbage."""
    parts = [part.split(",") for part in header.split(" ")]
    return [",".join(part[:2]).encode("utf-8", "replace") for part in parts if part[0] == "v1"]
