"""The configuration: one frozen object, read from variables and validated as a whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from dotenv import dotenv_values

from clerkhooks import parsing
from clerkhooks.database_url import parse_database_url
from clerkhooks.errors import Fault, SettingsError

PROJECT = Path(__file__).resolve().parent.parent
SECRET_VARIABLES = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
DEFAULT_DATABASE_URL = "sqlite:///clerkhooks.db"  # in the instance folder
VERSION_TABLE = "clerkhooks_version"  # other programs may have an alembic_version
_ENDPOINT = "Clerk Dashboard, Webhooks, your endpoint, Signing Secret: whsec_…"
_GENERATE = "Any secret of at least 16 characters, such as the output of: openssl rand -hex 16"
VARIABLES = {
    "CLERK_WEBHOOK_SECRET": _ENDPOINT,
    "CLERK_WEBHOOK_SIGNING_SECRET": _ENDPOINT,
    "DATABASE_URL": "For example postgresql://user:password@host/name",
    "CLERK_JWT_KEY": "Clerk Dashboard, API keys, JWT public key (PEM).",
    "CLERK_PUBLISHABLE_KEY": "Clerk Dashboard, API keys: pk_test_… or pk_live_…",
    "CLERK_SECRET_KEY": "Clerk Dashboard, API keys, Secret keys: sk_test_… or sk_live_…",
    "CLERK_JWKS_URL": "Leave it unset unless your Clerk instance is behind your own proxy.",
    "CLERK_ISSUER": "Clerk Dashboard, API keys, Frontend API URL: https://clerk.example.com",
    "CLERK_API_URL": "Leave it unset: the default is https://api.clerk.com",
    "CLERK_JWKS_KEEP_HOURS": "A number of hours, such as 12.",
    "CLERK_AUTHORIZED_PARTIES": "The origins of your front ends, such as https://app.example.com",
    "CLERK_AUDIENCE": "The aud claim of your tokens.",
    "METRICS_TOKEN": _GENERATE,
    "CONSOLE_PASSWORD": _GENERATE,
    "DATABASE_POOL_SIZE": "The size of clerkhooks' connection pool per process, such as 5.",
    "DATABASE_POOLER": "session or transaction: the mode of a pooler such as PgBouncer.",
    "LOG_FORMAT": "json or text.",
    "PORT": "A free TCP port, such as 8000.",
    "WEB_CONCURRENCY": "The number of worker processes, such as 2.",
}
"""Every variable that is read, and where to find its value."""
# From the platforms' documentation: Heroku, "Dynos" (Dokku sets the same variable); Render, "Default
# Environment Variables"; Railway, "Variables Reference"; Fly, "The Machine Runtime Environment";
# Cloud Run, "Container runtime contract". DigitalOcean's App Platform sets none.
EPHEMERAL_PLATFORMS = {
    "DYNO": "Heroku",
    "RENDER": "Render",
    "RAILWAY_PROJECT_ID": "Railway",
    "FLY_APP_NAME": "Fly",
    "K_SERVICE": "Cloud Run",
}
"""Variables by which a platform is recognized whose file system does not last."""
T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration of one application. Its repr shows no secret."""

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
        Read every variable from *values*. An empty value counts as unset.

        Raises:
            SettingsError: with every problem at once.
        """
        read = _Reader(values)
        found = cls._read(read)
        if read.faults:
            raise SettingsError(read.faults)
        return cls(**found)

    @classmethod
    def _read(cls, read: _Reader) -> dict[str, Any]:
        secret = next(filter(read.text, SECRET_VARIABLES), SECRET_VARIABLES[0])
        frontend_api = read("CLERK_PUBLISHABLE_KEY", parsing.parse_publishable_key, None)
        instance = f"https://{frontend_api}" if frontend_api else None
        found = {
            "webhook_secrets": read(secret, parsing.parse_webhook_secrets, ()),
            "jwt_keys": read("CLERK_JWT_KEY", parsing.parse_jwt_keys, ()),
            "jwks_url": read(
                "CLERK_JWKS_URL",
                parsing.parse_url,
                instance and f"{instance}/.well-known/jwks.json",
            ),
            "jwks_keep_hours": read("CLERK_JWKS_KEEP_HOURS", parsing.number_up_to(168), 12),
            "publishable_key": read.text("CLERK_PUBLISHABLE_KEY") or None,
            "secret_key": read("CLERK_SECRET_KEY", parsing.parse_secret_key, None),
            "api_url": read("CLERK_API_URL", parsing.parse_url, "https://api.clerk.com"),
            "issuers": read("CLERK_ISSUER", parsing.parse_issuers, (instance,) if instance else ()),
            "authorized_parties": read("CLERK_AUTHORIZED_PARTIES", parsing.parse_origins, ()),
            "audience": read("CLERK_AUDIENCE", parsing.split, ()),
            "metrics_token": read("METRICS_TOKEN", parsing.parse_password, None),
            "console_password": read("CONSOLE_PASSWORD", parsing.parse_password, None),
            "pool_size": read("DATABASE_POOL_SIZE", parsing.number_up_to(100), cls.pool_size),
            "pooler": read("DATABASE_POOLER", parsing.parse_pooler, None),
        }
        read.require(secret, "is not set.")
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
        found = super()._read(read) | {
            "database_url": read("DATABASE_URL", parse_database_url, DEFAULT_DATABASE_URL),
            "log_format": read("LOG_FORMAT", parsing.parse_log_format, "auto"),
            "port": read("PORT", parsing.number_up_to(65535), 8000),
            "web_concurrency": read("WEB_CONCURRENCY", parsing.number_up_to(512), 2),
        }
        platform = next(
            (EPHEMERAL_PLATFORMS[name] for name in EPHEMERAL_PLATFORMS if read.text(name)), None
        )
        if platform and not os.path.ismount(PROJECT / "instance"):
            problem = f"is not set, and files on {platform} do not last. Attach a PostgreSQL."
            read.require("DATABASE_URL", problem)
        return found


class AppConfig(Mapping[str, Any]):
    """An application's configuration: ``app.config`` first, then the environment, same names."""

    def __init__(self, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._config, self._environ = config, environ

    def __getitem__(self, name: str) -> Any:
        """Return a variable's value. None or an empty value in ``app.config`` counts as unset."""
        value = self._config.get(name)
        return value if _as_text(value) else self._environ[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the variables that are set in either place."""
        own = (name for name in VARIABLES if _as_text(self._config.get(name)))
        return iter(dict.fromkeys((*own, *self._environ)))

    def __len__(self) -> int:
        """Return the number of variables."""
        return sum(1 for _ in self)


def read_environ(project: Path = PROJECT) -> dict[str, str]:
    """
    Return the environment and the variables in ``.env`` beside wsgi.py. The environment wins.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        loaded = {name: value or "" for name, value in dotenv_values(project / ".env").items()}
        if any("\0" in text for text in (*loaded, *loaded.values())):
            raise ValueError
    except UnicodeDecodeError:
        fault = Fault(".env", "is not UTF-8 text.", "Start again from .env.example.")
        raise SettingsError([fault]) from None
    except (OSError, ValueError):  # no permission, or a NUL, which a variable cannot contain
        remedy = "Check its permissions, or start again from .env.example."
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
    """Reads variables one by one and collects the faults."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.faults: list[Fault] = []

    def __call__(self, variable: str, parse: Callable[[str], T], default: D) -> T | D:
        text = self.text(variable)
        if not text:
            return default
        try:
            return parse(text)
        except UnicodeError:
            self._add(variable, "is not UTF-8 text.")
            return default
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
    """Return *value*, which may be a list or a number in ``app.config``, as a variable's text."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return ",".join(map(str, value)).strip()
    return "" if value is None else str(value).strip()
