"""One frozen object with all configuration, read from the environment and validated whole."""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from dotenv import load_dotenv
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from clerkhooks.errors import Fault, SettingsError

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_DATABASE_URL = "sqlite:///clerkhooks.db"  # in the instance folder
_ENDPOINT = "Clerk Dashboard, Webhooks, your endpoint, Signing Secret: whsec_…"
VARIABLES = {
    "CLERK_WEBHOOK_SECRET": _ENDPOINT,
    "CLERK_WEBHOOK_SIGNING_SECRET": _ENDPOINT,
    "DATABASE_URL": "For example postgresql://user:password@host/name",
    "CLERK_JWT_KEY": "Clerk Dashboard, API keys, JWT public key (PEM).",
    "CLERK_PUBLISHABLE_KEY": "Clerk Dashboard, API keys: pk_test_… or pk_live_…",
    "CLERK_SECRET_KEY": "Clerk Dashboard, API keys, Secret keys: sk_test_… or sk_live_…",
    "CLERK_JWKS_URL": "Leave it unset unless your instance is behind a proxy of your own.",
    "CLERK_ISSUER": "Clerk Dashboard, API keys, Frontend API URL: https://clerk.example.com",
    "CLERK_API_URL": "Leave it unset: the default is https://api.clerk.com",
    "CLERK_JWKS_KEEP_HOURS": "A number of hours, such as 12.",
    "CLERK_AUTHORIZED_PARTIES": "The origins of your front ends: https://app.example.com,http://localhost:3000",
    "CLERK_AUDIENCE": "What your tokens carry as aud.",
    "METRICS_TOKEN": "Any secret of 16 characters or more, such as the output of: openssl rand -hex 16",
    "CONSOLE_PASSWORD": "Any secret of 12 characters or more, such as the output of: openssl rand -hex 12",
    "LOG_FORMAT": "json or text.",
    "PORT": "A free TCP port, such as 8000.",
    "WEB_CONCURRENCY": "The number of worker processes, such as 2.",
    "DYNO": "Set by the platform.",
}
"""Every variable that is read, and where its right value is to be found."""
_PEM = re.compile(r"-----BEGIN (?:RSA )?PUBLIC KEY-----(.*?)-----END (?:RSA )?PUBLIC KEY-----", re.DOTALL)
_POSTGRESQL = re.compile(r"^postgres(ql(\+psycopg)?)?://")
T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the service is told from outside. Nothing secret shows in its repr."""

    webhook_secrets: tuple[bytes, ...] = field(repr=False)
    database_url: str = field(repr=False, default=DEFAULT_DATABASE_URL)
    jwt_keys: tuple[RSAPublicKey, ...] = field(repr=False, default=())
    jwks_url: str | None = None
    jwks_keep_hours: int = 12
    publishable_key: str | None = None
    secret_key: str | None = field(repr=False, default=None)
    api_url: str = "https://api.clerk.com"
    issuer: str | None = None
    authorized_parties: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    metrics_token: str | None = field(repr=False, default=None)
    console_password: str | None = field(repr=False, default=None)
    log_format: str | None = None
    port: int = 8000
    web_concurrency: int = 2

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """
        Read every variable; one that is empty counts as unset.

        Raises:
            SettingsError: with all faults at once, if any value cannot work.
        """
        read = _Reader(environ)
        names = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
        secret = next(filter(read.text, names), names[0])
        frontend_api = read("CLERK_PUBLISHABLE_KEY", parse_publishable_key, None)
        instance = f"https://{frontend_api}" if frontend_api else None
        values = {
            "webhook_secrets": read(secret, _parse_webhook_secrets, ()),
            "database_url": read("DATABASE_URL", _parse_database_url, DEFAULT_DATABASE_URL),
            "jwt_keys": read("CLERK_JWT_KEY", parse_jwt_keys, ()),
            "jwks_url": read("CLERK_JWKS_URL", parse_url, instance and f"{instance}/.well-known/jwks.json"),
            "jwks_keep_hours": read("CLERK_JWKS_KEEP_HOURS", lambda text: _parse_number(text, 168), 12),
            "publishable_key": read.text("CLERK_PUBLISHABLE_KEY") or None,
            "secret_key": read("CLERK_SECRET_KEY", _parse_secret_key, None),
            "api_url": read("CLERK_API_URL", parse_url, "https://api.clerk.com"),
            "issuer": read("CLERK_ISSUER", parse_url, instance),
            "authorized_parties": read("CLERK_AUTHORIZED_PARTIES", _parse_origins, ()),
            "audience": read("CLERK_AUDIENCE", _split, ()),
            "metrics_token": read("METRICS_TOKEN", _parse_metrics_token, None),
            "console_password": read("CONSOLE_PASSWORD", _parse_console_password, None),
            "log_format": read("LOG_FORMAT", _parse_log_format, None),
            "port": read("PORT", lambda text: _parse_number(text, 65535), 8000),
            "web_concurrency": read("WEB_CONCURRENCY", lambda text: _parse_number(text, 512), 2),
        }
        read.require(secret, "is not set.")
        if read.text("DYNO"):
            read.require("DATABASE_URL", "is not set, and this platform throws its disk away; attach a PostgreSQL.")
        if read.faults:
            raise SettingsError(read.faults)
        return cls(**values)  # type: ignore[arg-type]  # each parser gives its field's type


def load_settings() -> Settings:
    """
    Settings of this process: the environment, then a .env file beside wsgi.py; real variables win.

    Raises:
        SystemExit: with status 2, after one message on stderr that lists every fault.
    """
    try:
        load_dotenv_file()
        return Settings.from_environ(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


def load_dotenv_file() -> None:
    """
    Take what ``.env`` beside wsgi.py says into the environment, where it says nothing else.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        load_dotenv(PROJECT / ".env")
    except UnicodeDecodeError:
        raise SettingsError([Fault(".env", "is not text in UTF-8.", "Start again from .env.example.")]) from None
    except (OSError, ValueError):  # no permission to read it; a NUL, which no variable can hold
        raise SettingsError([Fault(".env", "cannot be read.", "Look at its permissions, or start again from .env.example.")]) from None


def names_postgresql(environ: Mapping[str, str]) -> bool:
    """Whether a PostgreSQL is configured, as far as can be told before all is validated."""
    return _POSTGRESQL.match(environ.get("DATABASE_URL", "").strip()) is not None


class _Reader:
    """Reads variables one by one and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[Fault] = []

    def __call__(self, variable: str, parse: Callable[[str], T], default: D) -> T | D:
        text = self.text(variable)
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            self._add(variable, str(error))
            return default

    def text(self, variable: str) -> str:
        return self._environ.get(variable, "").strip()

    def require(self, variable: str, problem: str) -> None:
        if not self.text(variable):
            self._add(variable, problem)

    def _add(self, variable: str, problem: str) -> None:
        self.faults.append(Fault(variable, problem, VARIABLES[variable]))


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part for part in re.split(r"[,\s]+", text) if part)
    # No part at all would read as unset, and switch off the very check that somebody meant to configure.
    if not parts:
        raise ValueError("holds nothing but separators.")
    return parts


def _parse_number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= most:
        raise ValueError(f"is not a number from 1 to {most}.")
    return int(text)


def _decode_base64(text: str) -> bytes | None:
    """Strict and canonical base64, or None: what Clerk's SDK refuses must not pass here."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def _parse_webhook_secrets(text: str) -> tuple[bytes, ...]:
    return tuple(_parse_webhook_secret(part) for part in _split(text))


def _parse_webhook_secret(text: str) -> bytes:
    if text.startswith(("sk_", "pk_")):
        raise ValueError("is an API key, not the signing secret of a webhook endpoint.")
    raw = _decode_base64(text.removeprefix("whsec_"))
    # The svix library accepts any text here and then verifies with a key that nobody knows.
    if raw is None:
        raise ValueError("is not a signing secret: whsec_ and base64 are expected.")
    if not 24 <= len(raw) <= 64:
        raise ValueError("is not a signing secret: it must hold 24 to 64 bytes. Was it cut when it was copied?")
    return raw


def _parse_database_url(text: str) -> str:
    try:
        url = make_url(_POSTGRESQL.sub("postgresql+psycopg://", text))
    except (ArgumentError, ValueError):
        raise ValueError("is not a database URL.") from None
    if url.drivername == "postgresql+psycopg":
        return _check_postgresql(url.render_as_string(hide_password=False))
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ValueError("names a database that is not supported: PostgreSQL and SQLite are.")
    if not url.database or ":memory:" in text or "mode=memory" in text:
        raise ValueError("keeps SQLite in memory, where each worker would have a database of its own; name a file.")
    # A relative one lies in the instance folder, which is made where it is missing.
    if not Path("/", url.database.removeprefix("file:")).parent.is_dir() and url.database.removeprefix("file:").startswith("/"):
        raise ValueError("names a SQLite file in a folder that is not there.")
    return text


def _check_postgresql(url: str) -> str:
    from psycopg import ProgrammingError  # chooses how to wait when it is imported: see serving.py
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(url.replace("+psycopg", "", 1))
    except ProgrammingError:
        raise ValueError("is not a database URL that PostgreSQL's libpq takes.") from None
    return url


def parse_jwt_keys(text: str) -> tuple[RSAPublicKey, ...]:
    r"""
    RSA public keys out of one or several PEMs.

    Platforms mangle line breaks: real ones, a literal ``\n``, none at all and a bare base64 body all work.

    Raises:
        ValueError: for anything else; its text does not quote the value.
    """
    text = text.replace("\\r", "").replace("\\n", "\n").strip("\"' \n")
    if "PRIVATE KEY" in text:
        raise ValueError("holds a private key. Only the public key belongs here; consider the private one compromised.")
    bodies = _PEM.findall(text)
    if "-----" in _PEM.sub("", text):
        raise ValueError("is not a PEM public key. Was it cut when it was copied?")
    return tuple(_parse_jwt_key(re.sub(r"\s+", "", body)) for body in bodies or [text])


def _parse_jwt_key(body: str) -> RSAPublicKey:
    try:
        key = load_der_public_key(base64.b64decode(body, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not a PEM public key. Was it cut when it was copied?") from None
    if not isinstance(key, RSAPublicKey) or key.key_size < 2048:
        raise ValueError("is not an RSA key of 2,048 bits or more.")
    return key


def parse_publishable_key(text: str) -> str:
    """
    The Frontend API host that a publishable key names: ``pk_live_`` and base64 of ``host$``.

    Raises:
        ValueError: if it is not a publishable key.
    """
    found = re.fullmatch(r"pk_(?:test|live)_([A-Za-z0-9+/=_-]+)", text)
    raw = found and _decode_base64(found[1] + "=" * (-len(found[1]) % 4))
    host = raw.decode("ascii", "replace") if raw else ""
    if not re.fullmatch(r"[a-z0-9.-]+(:[0-9]+)?\$", host):
        raise ValueError("is not a publishable key.")
    return host[:-1]


def _parse_secret_key(text: str) -> str:
    if not re.fullmatch(r"sk_(?:test|live)_[A-Za-z0-9]+", text):
        raise ValueError("is not a secret key.")
    return text


def _parse_metrics_token(text: str) -> str:
    # Guessed as often as anybody likes, it must not be guessable.
    if not re.fullmatch(r"[!-~]{16,}", text):
        raise ValueError("is not 16 or more printable ASCII characters without a blank.")
    return text


def _parse_console_password(text: str) -> str:
    if len(text) < 12 or not text.isprintable():
        raise ValueError("is not 12 or more printable characters.")
    return text


def _parse_log_format(text: str) -> str:
    if text not in ("json", "text"):
        raise ValueError("is neither json nor text.")
    return text


def parse_url(text: str) -> str:
    """
    An https URL, or an http one to a loopback address.

    Raises:
        ValueError: for anything else; its text does not quote the value.
    """
    url = _split_url(text)
    if re.search("[?#]", text) or url.scheme not in ("https", "http"):
        raise ValueError("is not an https:// URL.")
    _refuse_plain_http(url)
    return text.rstrip("/")


def _parse_origins(text: str) -> tuple[str, ...]:
    return tuple(_parse_origin(part) for part in _split(text))


def _parse_origin(text: str) -> str:
    # Not only https: Clerk's SDKs for browser extensions and phones send azp of other schemes.
    url = _split_url(text)
    if text != f"{url.scheme}://{url.netloc}" or text != text.lower() or text.endswith(":"):
        raise ValueError("is not all origins as a browser sends them: scheme://host or scheme://host:port, in lower case, no path.")
    if (url.scheme, url.port) in (("https", 443), ("http", 80)):
        raise ValueError("holds an origin with its scheme's own port, which browsers leave out.")
    _refuse_plain_http(url)
    return text


def _split_url(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port  # raises for a port that is none
    except ValueError:
        raise ValueError("is not a URL.") from None
    if not url.scheme or not url.hostname or url.username is not None or re.search(r"[\s*\\<>\"']", text):
        raise ValueError("is not a URL of the form https://host, without wildcards or passwords.")
    return url


def _refuse_plain_http(url: SplitResult) -> None:
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        raise ValueError("is http:// to another machine; only https:// is safe there.")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
