"""
Parsers for the values of variables.

Each parser raises ValueError for an invalid value. The message, such as "must be a number.",
continues a sentence that begins with the variable's name. It never quotes the value.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

T = TypeVar("T")
NATIVE = "native"
"""An authorized party that admits bearer tokens without ``azp``, as sent by mobile apps."""
_PEM = re.compile(
    r"-----BEGIN (?:RSA )?PUBLIC KEY-----(.*?)-----END (?:RSA )?PUBLIC KEY-----", re.DOTALL
)


def split(text: str) -> tuple[str, ...]:
    """Return the entries of a list. Commas, spaces or both separate the entries."""
    parts = tuple(part for part in re.split(r"[,\s]+", text) if part)
    # A value with only separators would count as unset and disable a check.
    if not parts:
        raise ValueError("contains no entries, only separators.")
    return parts


def list_of(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return a parser for a list. *parse* parses each entry."""
    return lambda text: tuple(map(parse, split(text)))


def number_up_to(most: int) -> Callable[[str], int]:
    """Return a parser for a number from 1 to *most*."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= most:
            raise ValueError(f"must be a number from 1 to {most}.")
        return int(text)

    return parse


def parse_follow(text: str) -> float:
    """Return the seconds between two rounds of the follower, or 0 if it is switched off."""
    if not re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,3})?", text):
        raise ValueError("must be a number of seconds, or 0.")
    seconds = float(text)
    if seconds and not 0.1 <= seconds <= 3600:
        raise ValueError("must be 0, or from 0.1 to 3600 seconds.")
    return seconds


def _decode_base64(text: str) -> bytes | None:
    """Decode canonical base64. Return None for other strings, which Clerk's SDK rejects."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def parse_webhook_secret(text: str) -> bytes:
    """Return the bytes of a webhook endpoint's signing secret."""
    if text.startswith(("sk_", "pk_")):
        raise ValueError("is an API key, not the signing secret of a webhook endpoint.")
    raw = _decode_base64(text.removeprefix("whsec_"))
    # The svix library would accept any string here, and then reject every message.
    if raw is None:
        raise ValueError("is not a signing secret, which is whsec_ followed by base64.")
    if not 24 <= len(raw) <= 75:  # the same limits as Svix's
        raise ValueError(
            "is not a signing secret, which encodes 24 to 75 bytes. Was it copied completely?"
        )
    return raw


def parse_jwt_keys(text: str) -> tuple[RSAPublicKey, ...]:
    r"""
    Return the RSA public keys from one or more PEM blocks.

    Some platforms change line breaks. Therefore, the value may contain real line breaks, literal
    ``\n`` or no line breaks. A bare base64 body is accepted too.
    """
    text = text.replace("\\r", "").replace("\\n", "\n").strip("\"' \n")
    if "PRIVATE KEY" in text:
        raise ValueError(
            "contains a private key. Use the public key, and treat the private key as compromised."
        )
    bodies = _PEM.findall(text)
    if "-----" in _PEM.sub("", text):
        raise ValueError("is not a PEM public key. Was it copied completely?")
    return tuple(_parse_jwt_key(re.sub(r"\s+", "", body)) for body in bodies or [text])


def _parse_jwt_key(body: str) -> RSAPublicKey:
    try:
        key = load_der_public_key(base64.b64decode(body, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not a PEM public key. Was it copied completely?") from None
    if not isinstance(key, RSAPublicKey) or key.key_size < 2048:
        raise ValueError("is not an RSA key of 2,048 bits or more.")
    return key


def parse_publishable_key(text: str) -> str:
    """Return the Frontend API host in a publishable key: ``pk_live_`` and base64 of ``host$``."""
    found = re.fullmatch(r"pk_(?:test|live)_([A-Za-z0-9+/=_-]+)", text)
    raw = found and _decode_base64(found[1] + "=" * (-len(found[1]) % 4))
    host = raw.decode("ascii", "replace") if raw else ""
    if not re.fullmatch(r"[a-z0-9.-]+(:[0-9]+)?\$", host):
        raise ValueError("is not a publishable key.")
    return host[:-1]


def parse_secret_key(text: str) -> str:
    """Validate a secret key for Clerk's Backend API, and return it."""
    if not re.fullmatch(r"sk_(?:test|live)_[A-Za-z0-9]+", text):
        raise ValueError("is not a secret key.")
    return text


def parse_password(text: str) -> str:
    """
    Validate a password or a bearer token, and return it.

    It must be valid in a header. It must be long, because the number of attempts is not limited.
    """
    if not re.fullmatch(r"[!-~]{16,}", text):
        raise ValueError("must be at least 16 printable ASCII characters, without spaces.")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts only *choices*."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be {' or '.join(choices)}.")
        return text

    return parse


def parse_url(text: str) -> str:
    """Validate a URL: https, or http to a loopback address. Return it without a final slash."""
    url = _split_url(text)
    if re.search("[?#]", text) or url.scheme not in ("https", "http"):
        raise ValueError("is not an https:// URL.")
    _refuse_plain_http(url)
    return text.rstrip("/")


def parse_authorized_party(text: str) -> str:
    """Validate an authorized party, which is an origin or ``native``, and return it."""
    if text == NATIVE:
        return text
    # Schemes other than https are valid: Clerk's SDKs for browser extensions and phones send them
    # in azp.
    url = _split_url(text)
    if text != f"{url.scheme}://{url.netloc}" or text != text.lower() or text.endswith(":"):
        raise ValueError(
            "is not a list of origins as browsers send them: scheme://host or scheme://host:port, "
            "in lower case and without a path."
        )
    if (url.scheme, url.port) in (("https", 443), ("http", 80)):
        raise ValueError("has an origin with its scheme's default port, which browsers omit.")
    _refuse_plain_http(url)
    return text


def _split_url(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port  # an invalid port raises ValueError
    except ValueError:
        raise ValueError("is not a URL.") from None
    is_whole = url.scheme and url.hostname and url.username is None and _is_host(url.hostname)
    # Browsers and DNS encode international host names in ASCII, with the prefix xn--.
    if not is_whole or re.search(r"[^!-~]|[*\\<>\"']", text):
        raise ValueError("is not a URL such as https://host, without wildcards or passwords.")
    return url


def _is_host(host: str) -> bool:
    return ":" in host or re.fullmatch(r"(?:[^.]{1,63}\.)*[^.]{1,63}\.?", host) is not None


def _refuse_plain_http(url: SplitResult) -> None:
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError("is an http:// URL to another machine. Use https://.")


def is_loopback(host: str) -> bool:
    """Return whether *host* is this machine. An IPv6 address must not have brackets."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
