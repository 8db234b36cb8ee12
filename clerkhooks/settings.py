"""The configuration: a frozen object that contains the validated values of all variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from dotenv import dotenv_values

from clerkhooks import parsing
from clerkhooks.database_url import parse_database_url
from clerkhooks.errors import Fault, SettingsError

PROJECT = Path(__file__).resolve().parent.parent
SECRET_VARIABLES = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
DEFAULT_DATABASE_URL = "sqlite:///clerkhooks.db"  # a file in the instance folder
VERSION_TABLE = "clerkhooks_version"  # other programs may use the default, alembic_version
_ENDPOINT = "Clerk Dashboard → Webhooks → your endpoint → Signing Secret: whsec_…"
_GENERATE = "Any secret of at least 16 characters, such as the output of: openssl rand -hex 16"
VARIABLES = {
    "CLERK_WEBHOOK_SECRET": _ENDPOINT,
    "CLERK_WEBHOOK_SIGNING_SECRET": _ENDPOINT,
    "DATABASE_URL": "For example postgresql://user:password@host/name",
    "CLERK_JWT_KEY": "Clerk Dashboard → API keys → JWT public key (PEM).",
    "CLERK_PUBLISHABLE_KEY": "Clerk Dashboard → API keys: pk_test_… or pk_live_…",
    "CLERK_SECRET_KEY": "Clerk Dashboard → API keys → Secret keys: sk_test_… or sk_live_…",
    "CLERK_FOLLOW": "The seconds between two requests for changes, such as 60, or 0.",
    "CLERK_JWKS_URL": "Leave it unset unless your Clerk instance is behind your own proxy.",
    "CLERK_ISSUER": "Clerk Dashboard → API keys → Frontend API URL: https://clerk.example.com",
    "CLERK_API_URL": "Leave it unset: the default is https://api.clerk.com",
    "CLERK_JWKS_KEEP_HOURS": "A number of hours, such as 12.",
    "CLERK_AUTHORIZED_PARTIES": "The origins of your front ends, such as https://app.example.com",
    "CLERK_AUDIENCE": "The aud claim of your tokens.",
    "METRICS_TOKEN": _GENERATE,
    "CONSOLE_PASSWORD": _GENERATE,
    "CLERK_TABLES": "organizations or changes, or both: organizations,changes",
    "CHANGES_TOKEN": _GENERATE,
    "DATABASE_POOL_SIZE": "The size of clerkhooks' connection pool per process, such as 5.",
    "DATABASE_POOLER": "session or transaction: the mode of a pooler such as PgBouncer.",
    "LOG_FORMAT": "json or text.",
    "PORT": "A free TCP port, such as 8000.",
    "WEB_CONCURRENCY": "The number of worker processes, such as 2.",
}
"""Every variable that is read, and where to find its value."""
# Sources: Heroku, "Dynos" (Dokku sets the same variable); Render, "Default Environment Variables";
# Railway, "Variables Reference"; Fly, "The Machine Runtime Environment"; Cloud Run, "Container
# runtime contract". DigitalOcean's App Platform sets no such variable.
EPHEMERAL_PLATFORMS = {
    "DYNO": "Heroku",
    "RENDER": "Render",
    "RAILWAY_PROJECT_ID": "Railway",
    "FLY_APP_NAME": "Fly",
    "K_SERVICE": "Cloud Run",
}
"""Variables that identify platforms with an ephemeral file system."""
Parsers = Mapping[str, tuple[str, Callable[[str], Any]]]
# The variable and the parser of each field. Settings parses the signing secrets and the publishable
# key separately.
_PARSERS: Parsers = {
    "jwt_keys": ("CLERK_JWT_KEY", parsing.parse_jwt_keys),
    "jwks_url": ("CLERK_JWKS_URL", parsing.parse_url),
    "jwks_keep_hours": ("CLERK_JWKS_KEEP_HOURS", parsing.number_up_to(168)),
    "secret_key": ("CLERK_SECRET_KEY", parsing.parse_secret_key),
    "api_url": ("CLERK_API_URL", parsing.parse_url),
    "follow": ("CLERK_FOLLOW", parsing.parse_follow),
    "issuers": ("CLERK_ISSUER", parsing.list_of(parsing.parse_url)),
    "authorized_parties": (
        "CLERK_AUTHORIZED_PARTIES",
        parsing.list_of(parsing.parse_authorized_party),
    ),
    "audience": ("CLERK_AUDIENCE", parsing.split),
    "metrics_token": ("METRICS_TOKEN", parsing.parse_password),
    "console_password": ("CONSOLE_PASSWORD", parsing.parse_password),
    "tables": ("CLERK_TABLES", parsing.list_of(parsing.one_of("organizations", "changes"))),
    "changes_token": ("CHANGES_TOKEN", parsing.parse_password),
    "pool_size": ("DATABASE_POOL_SIZE", parsing.number_up_to(100)),
    "pooler": ("DATABASE_POOLER", parsing.one_of("session", "transaction")),
}
_SERVICE_PARSERS: Parsers = {
    "database_url": ("DATABASE_URL", parse_database_url),
    "log_format": ("LOG_FORMAT", parsing.one_of("json", "text")),
    "port": ("PORT", parsing.number_up_to(65535)),
    "web_concurrency": ("WEB_CONCURRENCY", parsing.number_up_to(512)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration of one application. Its repr shows no secrets."""

    webhook_secrets: tuple[bytes, ...] = field(repr=False)
    jwt_keys: tuple[RSAPublicKey, ...] = field(repr=False, default=())
    jwks_url: str | None = None
    jwks_keep_hours: int = 12
    publishable_key: str | None = None
    secret_key: str | None = field(repr=False, default=None)
    api_url: str = "https://api.clerk.com"
    follow: float = 60.0
    issuers: tuple[str, ...] = ()
    authorized_parties: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    metrics_token: str | None = field(repr=False, default=None)
    console_password: str | None = field(repr=False, default=None)
    tables: tuple[str, ...] = ()
    changes_token: str | None = field(repr=False, default=None)
    pool_size: int = 5
    pooler: Literal["session", "transaction"] | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """
        Read every variable from *values*. An empty value counts as unset.

        Raises:
            SettingsError: a value is invalid or missing. The error lists every problem.
        """
        read = _Reader(values)
        found = cls._read(read)
        if read.faults:
            raise SettingsError(read.faults)
        return cls(**{name: value for name, value in found.items() if value is not None})

    @classmethod
    def _read(cls, read: _Reader) -> dict[str, Any]:
        found = {name: read(*variable) for name, variable in _PARSERS.items()}
        secret = next(filter(read.text, SECRET_VARIABLES), SECRET_VARIABLES[0])
        if not read.text(secret):
            read.add_fault(secret, "is not set.")
        found["webhook_secrets"] = read(secret, parsing.list_of(parsing.parse_webhook_secret))
        if found["changes_token"] and "changes" not in (found["tables"] or ()):
            read.add_fault("CLERK_TABLES", "does not contain changes, but CHANGES_TOKEN is set.")
        frontend_api = read("CLERK_PUBLISHABLE_KEY", parsing.parse_publishable_key)
        if frontend_api is not None:
            instance = f"https://{frontend_api}"
            found["publishable_key"] = read.text("CLERK_PUBLISHABLE_KEY")
            found["jwks_url"] = found["jwks_url"] or f"{instance}/.well-known/jwks.json"
            found["issuers"] = found["issuers"] or (instance,)
        return found


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(Settings):
    """The configuration of the service, including its database, log and server."""

    database_url: str = field(repr=False, default=DEFAULT_DATABASE_URL)
    log_format: Literal["auto", "json", "text"] = "auto"
    port: int = 8000
    web_concurrency: int = 2
    pool_size: int = 10

    @classmethod
    def _read(cls, read: _Reader) -> dict[str, Any]:
        platforms = [EPHEMERAL_PLATFORMS[name] for name in EPHEMERAL_PLATFORMS if read.text(name)]
        is_lost = platforms and not os.path.ismount(PROJECT / "instance")
        if is_lost and not read.text("DATABASE_URL"):
            problem = f"is not set, and files on {platforms[0]} do not persist. Attach PostgreSQL."
            read.add_fault("DATABASE_URL", problem)
        own = {name: read(*variable) for name, variable in _SERVICE_PARSERS.items()}
        return super()._read(read) | own


def merge_config(config: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Merge ``app.config`` into *environ*. Non-empty values in ``app.config`` take precedence."""
    own = {name: config[name] for name in VARIABLES if as_text(config.get(name))}
    return dict(environ) | own


def read_environ(project: Path = PROJECT) -> dict[str, str]:
    """
    Return *project*'s ``.env`` merged with the environment, which takes precedence.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        loaded = {name: value or "" for name, value in dotenv_values(project / ".env").items()}
        if any("\0" in text for text in (*loaded, *loaded.values())):
            raise ValueError
    except (OSError, ValueError) as error:  # the file contains NUL or is not UTF-8
        is_other = isinstance(error, UnicodeDecodeError)
        problem = "is not UTF-8 text." if is_other else "cannot be read."
        remedy = "Check its permissions, or start again from .env.example."
        raise SettingsError([Fault(".env", problem, remedy)]) from None
    return loaded | dict(os.environ)


@contextmanager
def exit_if_invalid() -> Iterator[None]:
    """After a SettingsError, print its message to stderr and exit with status 2."""
    try:
        yield
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


class _Reader:
    """Reads variables one by one and collects the faults."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.faults: list[Fault] = []

    def __call__(self, variable: str, parse: Callable[[str], Any]) -> Any:
        """Return the parsed value of *variable*, or None if it is unset or invalid."""
        text = self.text(variable)
        try:
            return parse(text) if text else None
        except UnicodeError:
            self.add_fault(variable, "is not UTF-8 text.")
            return None
        except ValueError as error:
            self.add_fault(variable, str(error))
            return None

    def text(self, variable: str) -> str:
        """Return the value of *variable* as text, or an empty string if it is unset."""
        return as_text(self._values.get(variable))

    def add_fault(self, variable: str, problem: str) -> None:
        self.faults.append(Fault(variable, problem, VARIABLES[variable]))


def as_text(value: Any) -> str:
    """Return *value* as text. A value in ``app.config`` may also be a list or a number."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return ",".join(map(str, value)).strip()
    return "" if value is None else str(value).strip()
