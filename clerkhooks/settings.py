"""One frozen object with all configuration, read from the environment and validated whole."""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from dotenv import dotenv_values
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from clerkhooks.errors import Fault, SettingsError

PROJECT = Path(__file__).resolve().parent.parent
SECRET_VARIABLES = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
NATIVE = "native"
"""Among the authorized parties: admits a bearer token without ``azp``, as mobile apps send."""
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
    "CONSOLE_PASSWORD": "Any secret of 16 characters or more, such as the output of: openssl rand -hex 16",
    "DATABASE_POOL_SIZE": "The number of connections of clerkhooks' own pool, per process, such as 5.",
    "DATABASE_POOLER": "session or transaction: the mode of a pooler such as PgBouncer.",
    "LOG_FORMAT": "json or text.",
    "PORT": "A free TCP port, such as 8000.",
    "WEB_CONCURRENCY": "The number of worker processes, such as 2.",
    "DYNO": "Set by the platform.",
}
"""Every variable that is read, and where its right value is to be found."""
_PEM = re.compile(
    r"-----BEGIN (?:RSA )?PUBLIC KEY-----(.*?)-----END (?:RSA )?PUBLIC KEY-----", re.DOTALL
)
_POSTGRESQL = re.compile(r"^postgres(ql(\+psycopg)?)?://")
T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration of one application. No secret shows in its repr."""

    webhook_secrets: tuple[bytes, ...] = field(repr=False)
    jwt_keys: tuple[RSAPublicKey, ...] = field(repr=False, default=())
    jwks_url: str | None = None
    jwks_keep_hours: int = 12
    publishable_key: str | None = None
    secret_key: str | None = field(repr=False, default=None)
    api_url: str = "https://api.clerk.com"
    issuers: tuple[str, ...] = ()
    authorized_parties: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    metrics_token: str | None = field(repr=False, default=None)
    console_password: str | None = field(repr=False, default=None)
    pool_size: int = 5
    pooler: Literal["session", "transaction"] | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """
        Read every variable from *values*; one that is empty counts as unset.

        Raises:
            SettingsError: listing every problem at once.
        """
        read = _Reader(values)
        found = cls._read(read)
        if read.faults:
            raise SettingsError(read.faults)
        return cls(**found)

    @classmethod
    def _read(cls, read: _Reader) -> dict[str, Any]:
        secret = next(filter(read.text, SECRET_VARIABLES), SECRET_VARIABLES[0])
        frontend_api = read("CLERK_PUBLISHABLE_KEY", parse_publishable_key, None)
        instance = f"https://{frontend_api}" if frontend_api else None
        found = {
            "webhook_secrets": read(secret, _parse_webhook_secrets, ()),
            "jwt_keys": read("CLERK_JWT_KEY", parse_jwt_keys, ()),
            "jwks_url": read(
                "CLERK_JWKS_URL", parse_url, instance and f"{instance}/.well-known/jwks.json"
            ),
            "jwks_keep_hours": read("CLERK_JWKS_KEEP_HOURS", _number_up_to(168), 12),
            "publishable_key": read.text("CLERK_PUBLISHABLE_KEY") or None,
            "secret_key": read("CLERK_SECRET_KEY", _parse_secret_key, None),
            "api_url": read("CLERK_API_URL", parse_url, "https://api.clerk.com"),
            "issuers": read("CLERK_ISSUER", _parse_issuers, (instance,) if instance else ()),
            "authorized_parties": read("CLERK_AUTHORIZED_PARTIES", _parse_origins, ()),
            "audience": read("CLERK_AUDIENCE", _split, ()),
            "metrics_token": read("METRICS_TOKEN", _parse_metrics_token, None),
            "console_password": read("CONSOLE_PASSWORD", _parse_metrics_token, None),
            "pool_size": read("DATABASE_POOL_SIZE", _number_up_to(100), cls.pool_size),
            "pooler": read("DATABASE_POOLER", _parse_pooler, None),
        }
        read.require(secret, "is not set.")
        return found


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(Settings):
    """The configuration of the service, which also owns its database, its log and its server."""

    database_url: str = field(repr=False, default=DEFAULT_DATABASE_URL)
    log_format: Literal["auto", "json", "text"] = "auto"
    port: int = 8000
    web_concurrency: int = 2
    pool_size: int = 10

    @classmethod
    def _read(cls, read: _Reader) -> dict[str, Any]:
        found = super()._read(read) | {
            "database_url": read("DATABASE_URL", _parse_database_url, DEFAULT_DATABASE_URL),
            "log_format": read("LOG_FORMAT", _parse_log_format, "auto"),
            "port": read("PORT", _number_up_to(65535), 8000),
            "web_concurrency": read("WEB_CONCURRENCY", _number_up_to(512), 2),
        }
        if read.text("DYNO"):
            problem = "is not set, and this platform throws its disk away; attach a PostgreSQL."
            read.require("DATABASE_URL", problem)
        return found


class AppConfig(Mapping[str, Any]):
    """An application's configuration: ``app.config`` first, then the environment, same names."""

    def __init__(self, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._config, self._environ = config, environ

    def __getitem__(self, name: str) -> Any:
        """Return the value of a variable; None or empty in ``app.config`` counts as unset."""
        value = self._config.get(name)
        return value if _as_text(value) else self._environ[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over every variable that is set in either place."""
        own = (name for name in VARIABLES if _as_text(self._config.get(name)))
        return iter(dict.fromkeys((*own, *self._environ)))

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(1 for _ in self)


def read_environ(project: Path = PROJECT) -> dict[str, str]:
    """
    Return the environment, and what ``.env`` beside wsgi.py adds to it; real variables win.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        loaded = {name: value or "" for name, value in dotenv_values(project / ".env").items()}
        if any("\0" in text for text in (*loaded, *loaded.values())):
            raise ValueError
    except UnicodeDecodeError:
        fault = Fault(".env", "is not text in UTF-8.", "Start again from .env.example.")
        raise SettingsError([fault]) from None
    except (OSError, ValueError):  # no permission; a NUL, which no variable can hold
        remedy = "Look at its permissions, or start again from .env.example."
        raise SettingsError([Fault(".env", "cannot be read.", remedy)]) from None
    return loaded | dict(os.environ)


@contextmanager
def exit_if_invalid() -> Iterator[None]:
    """
    End the process with status 2 and one message if the configuration is invalid.

    Raises:
        SystemExit: instead of a SettingsError.
    """
    try:
        yield
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


class _Reader:
    """Reads variables one by one and collects what is wrong with them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
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
        """Return a value as text, which is empty if the variable is unset."""
        return _as_text(self._values.get(variable))

    def require(self, variable: str, problem: str) -> None:
        if not self.text(variable):
            self._add(variable, problem)

    def _add(self, variable: str, problem: str) -> None:
        self.faults.append(Fault(variable, problem, VARIABLES[variable]))


def _as_text(value: Any) -> str:
    """Return a value as a variable would hold it; ``app.config`` may hold a list or a number."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return ",".join(map(str, value)).strip()
    return "" if value is None else str(value).strip()


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part for part in re.split(r"[,\s]+", text) if part)
    # No part at all would read as unset, and switch off the very check that somebody meant to
    # configure.
    if not parts:
        raise ValueError("holds nothing but separators.")
    return parts


def _number_up_to(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= most:
            raise ValueError(f"is not a number from 1 to {most}.")
        return int(text)

    return parse


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
    if not 24 <= len(raw) <= 75:  # Svix's own limits
        raise ValueError(
            "is not a signing secret: it must hold 24 to 75 bytes. Was it cut when it was copied?"
        )
    return raw


def _parse_database_url(text: str) -> str:
    try:
        url = make_url(_POSTGRESQL.sub("postgresql+psycopg://", text))
    except (ArgumentError, ValueError):
        raise ValueError("is not a database URL.") from None
    if url.drivername == "postgresql+psycopg":
        options = url.query.get("options")
        if isinstance(options, tuple):  # given several times, as SQLAlchemy's documentation has it
            url = url.update_query_dict({"options": " ".join(options)})
        return _check_postgresql(url.render_as_string(hide_password=False))
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ValueError("names a database that is not supported: PostgreSQL and SQLite are.")
    if not url.database or ":memory:" in text or "mode=memory" in text:
        raise ValueError(
            "keeps SQLite in memory, where each worker would have a database of its own; name a file."
        )
    # A relative one lies in the instance folder, which is made where it is missing.
    if not Path(
        "/", url.database.removeprefix("file:")
    ).parent.is_dir() and url.database.removeprefix("file:").startswith("/"):
        raise ValueError("names a SQLite file in a folder that is not there.")
    return text


def _check_postgresql(url: str) -> str:
    from psycopg import ProgrammingError  # chooses how it waits when imported: after gevent
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(url.replace("+psycopg", "", 1))
    except ProgrammingError:
        raise ValueError("is not a database URL that PostgreSQL's libpq takes.") from None
    return url


def parse_jwt_keys(text: str) -> tuple[RSAPublicKey, ...]:
    r"""
    RSA public keys out of one or several PEMs.

    Platforms mangle line breaks: real ones, a literal ``\n``, none at all and a bare base64 body
    all work.

    Raises:
        ValueError: for anything else; its text does not quote the value.
    """
    text = text.replace("\\r", "").replace("\\n", "\n").strip("\"' \n")
    if "PRIVATE KEY" in text:
        raise ValueError(
            "holds a private key. Only the public key belongs here; consider the private one compromised."
        )
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


def _parse_pooler(text: str) -> Literal["session", "transaction"]:
    modes: dict[str, Literal["session", "transaction"]] = {
        "session": "session",
        "transaction": "transaction",
    }
    if text not in modes:
        raise ValueError("is neither session nor transaction.")
    return modes[text]


def _parse_log_format(text: str) -> Literal["json", "text"]:
    formats: dict[str, Literal["json", "text"]] = {"json": "json", "text": "text"}
    if text not in formats:
        raise ValueError("is neither json nor text.")
    return formats[text]


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


def _parse_issuers(text: str) -> tuple[str, ...]:
    return tuple(parse_url(part) for part in _split(text))


def _parse_origins(text: str) -> tuple[str, ...]:
    return tuple(part if part == NATIVE else _parse_origin(part) for part in _split(text))


def _parse_origin(text: str) -> str:
    # Not only https: Clerk's SDKs for browser extensions and phones send azp of other schemes.
    url = _split_url(text)
    if text != f"{url.scheme}://{url.netloc}" or text != text.lower() or text.endswith(":"):
        raise ValueError(
            "is not all origins as a browser sends them: scheme://host or scheme://host:port, in lower case, no path."
        )
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
    if (
        not url.scheme
        or not url.hostname
        or url.username is not None
        or re.search(r"[\s*\\<>\"']", text)
    ):
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
