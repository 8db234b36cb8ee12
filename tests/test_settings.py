"""Configuration: all invalid variables are reported at once, without their values."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks import SettingsError, create_app, service
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import (
    DEFAULT_DATABASE_URL,
    VARIABLES,
    ServiceSettings,
    Settings,
    merge_config,
    read_environ,
)
from clerkhooks.web.state import State, disconnect
from tests.application import Application
from tests.conftest import MakeService
from tests.server import environ

CLERK, OTHER = FakeClerk(), FakeClerk()
PEM, OTHER_PEM = CLERK.public_key_pem, OTHER.public_key_pem
BODY = "".join(PEM.splitlines()[1:-1])
EC_PEM = (
    ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    .decode()
)
SHORT_KEY = rsa.generate_private_key(65537, 1024).public_key()
SHORT_PEM = SHORT_KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
PKCS1_PEM = CLERK.private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1).decode()
PRIVATE_PEM = CLERK.private_key.private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
).decode()


def whsec(length: int, byte: bytes = b"s") -> str:
    """Return a signing secret of *length* bytes."""
    return "whsec_" + base64.b64encode(byte * length).decode()


def publishable(text: str, kind: str = "live") -> str:
    """Return a publishable key that encodes *text*."""
    return f"pk_{kind}_" + base64.b64encode(text.encode()).decode()


def read(**environ: Any) -> ServiceSettings:
    """Return the settings of a service that has a signing secret and these variables."""
    return ServiceSettings.from_mapping({"CLERK_WEBHOOK_SECRET": whsec(24)} | environ)


def faults(**environ: Any) -> dict[str, str]:
    """Return the reported problems by variable."""
    with pytest.raises(SettingsError) as refused:
        read(**environ)
    assert refused.value.reason == "invalid_settings"
    return {fault.variable: fault.problem for fault in refused.value.faults}


def test_needs_a_signing_secret_only() -> None:
    """Only the signing secret is required. All other variables have defaults."""
    assert read() == ServiceSettings(webhook_secrets=(b"s" * 24,))
    minimal = {"CLERK_WEBHOOK_SECRET": whsec(24)}
    assert Settings.from_mapping(minimal) == Settings(webhook_secrets=(b"s" * 24,))
    assert (Settings.pool_size, ServiceSettings.pool_size) == (5, 10)


def test_counts_an_empty_variable_as_unset() -> None:
    """An empty variable counts as unset, because some platforms create empty variables."""
    assert read(**dict.fromkeys(set(VARIABLES) - {"CLERK_WEBHOOK_SECRET"}, "")) == read()
    assert read(**dict.fromkeys(set(VARIABLES) - {"CLERK_WEBHOOK_SECRET", "DYNO"}, " \n")) == read()


@pytest.mark.parametrize(
    ("environ", "field", "value"),
    [
        (
            {"CLERK_WEBHOOK_SECRET": whsec(24).removeprefix("whsec_")},
            "webhook_secrets",
            (b"s" * 24,),
        ),
        ({"CLERK_WEBHOOK_SECRET": whsec(75)}, "webhook_secrets", (b"s" * 75,)),
        (
            {"CLERK_WEBHOOK_SECRET": f" {whsec(24)}, {whsec(64)}\n{whsec(32)}"},
            "webhook_secrets",
            (b"s" * 24, b"s" * 64, b"s" * 32),
        ),
        ({"CLERK_WEBHOOK_SIGNING_SECRET": whsec(24, b"b")}, "webhook_secrets", (b"s" * 24,)),
        (
            {"CLERK_WEBHOOK_SECRET": " ", "CLERK_WEBHOOK_SIGNING_SECRET": whsec(24, b"b")},
            "webhook_secrets",
            (b"b" * 24,),
        ),
        ({"DATABASE_URL": "postgres://u:p@h/n"}, "database_url", "postgresql+psycopg://u:p@h/n"),
        (
            {"DATABASE_URL": "postgresql://u:p%40@h:5/n?sslmode=require"},
            "database_url",
            "postgresql+psycopg://u:p%40@h:5/n?sslmode=require",
        ),
        ({"DATABASE_URL": "postgresql+psycopg://h/n"}, "database_url", "postgresql+psycopg://h/n"),
        ({"DATABASE_URL": "sqlite:////tmp/x.db"}, "database_url", "sqlite:////tmp/x.db"),
        ({"DATABASE_URL": "sqlite+pysqlite:///x.db"}, "database_url", "sqlite+pysqlite:///x.db"),
        (
            {"DATABASE_URL": "postgres://h/n", "DYNO": "web.1"},
            "database_url",
            "postgresql+psycopg://h/n",
        ),
        (
            {"CLERK_PUBLISHABLE_KEY": publishable("clerk.example.com$")},
            "issuers",
            ("https://clerk.example.com",),
        ),
        (
            {"CLERK_PUBLISHABLE_KEY": publishable("a-b.example$", "test").rstrip("=")},
            "issuers",
            ("https://a-b.example",),
        ),
        (
            {"CLERK_PUBLISHABLE_KEY": publishable("a.b$"), "CLERK_ISSUER": "https://c.d/"},
            "issuers",
            ("https://c.d",),
        ),
        (
            {"CLERK_ISSUER": "https://a.example:8443/path"},
            "issuers",
            ("https://a.example:8443/path",),
        ),
        (
            {"CLERK_ISSUER": "https://a.b, https://c.d/\nhttps://e.f"},
            "issuers",
            ("https://a.b", "https://c.d", "https://e.f"),
        ),
        *(
            ({"CLERK_ISSUER": f"http://{host}"}, "issuers", (f"http://{host}",))
            for host in ("127.0.0.2:3", "[::1]:5", "a.localhost")
        ),
        (
            {
                "CLERK_SECRET_KEY": "sk_test_aB3",
                "CLERK_API_URL": "https://a.b",
                "CLERK_JWKS_URL": "https://a.b/jwks",
            },
            "issuers",
            (),
        ),
        (
            {"CLERK_AUTHORIZED_PARTIES": "https://a.b, http://localhost:3000"},
            "authorized_parties",
            ("https://a.b", "http://localhost:3000"),
        ),
        (
            {"CLERK_AUTHORIZED_PARTIES": "chrome-extension://abc"},
            "authorized_parties",
            ("chrome-extension://abc",),
        ),
        ({"CLERK_AUTHORIZED_PARTIES": "native"}, "authorized_parties", ("native",)),
        (
            {"CLERK_AUTHORIZED_PARTIES": "https://a.b native"},
            "authorized_parties",
            ("https://a.b", "native"),
        ),
        ({"CLERK_JWKS_KEEP_HOURS": "168"}, "jwks_keep_hours", 168),
        *(({"CLERK_FOLLOW": text}, "follow", float(text)) for text in ("0", "0.1", "30", "3600")),
        *(({"DATABASE_POOL_SIZE": str(size)}, "pool_size", size) for size in (1, 100)),
        ({"LOG_FORMAT": "text"}, "log_format", "text"),
        ({"CLERK_AUDIENCE": "a,b c"}, "audience", ("a", "b", "c")),
        *(({"PORT": str(port)}, "port", port) for port in (1, 65535)),
        *(({"WEB_CONCURRENCY": str(count)}, "web_concurrency", count) for count in (1, 512)),
    ],
)
def test_accepts_every_documented_form(environ: dict[str, str], field: str, value: Any) -> None:
    assert getattr(read(**environ), field) == value


BAD_URLS = {
    "": [
        "https://",
        "https:",
        "//a.b",
        "a.b",
        "https://u:p@a.b",
        "https://@a.b",
        "https://a.b:x",
        "https://a.b:70000",
        "https://[::1",
        "https://a..b",
        "https://ä.b",
        f"https://{'a' * 64}.b",
        "https://a.b\x7f",
        "https://a.b\udcff",
    ],
    "http": ["http://a.b", "http://localhost.a.b", "http://128.0.0.1", "http://0.0.0.0"],
    "path": ["https://a.b?x", "https://a.b#x", "https://a.b?", "https://a.b#"],
}
BAD = {
    "CLERK_WEBHOOK_SECRET": {
        "is an API key": ["sk_test_abc", "pk_test_abc", f"{whsec(24)},sk_live_x"],
        "24 to 75 bytes": [whsec(23), whsec(76), "whsec_", whsec(24) + "," + whsec(23)],
        "whsec_ followed by base64": [
            whsec(25)[:-3] + "x==",
            whsec(25)[:-2],
            whsec(24) + "!",
            "whsec_é",
            "x_" + whsec(24),
            "-_" * 20,
        ],
        "contains no entries": [",", " , "],
    },
    "DATABASE_URL": {
        "is not a database URL": ["x", "postgres://h:port/n", "://", "postgres:/h"],
        "unsupported database": [
            "mysql://h/n",
            "postgresql+psycopg2://h/n",
            "sqlite+aiosqlite:///x",
        ],
        "in a folder that does not exist": [
            "sqlite:////nonexistent/x.db",
            "sqlite:///file:/nonexistent/x.db?uri=true",
            f"sqlite:////{'x' * 300}/x.db",
        ],
        "is not a database URL that SQLAlchemy accepts": [
            "sqlite://folder/x.db",
            "sqlite:///x.db?timeout=long",
            "sqlite:///x.db?timeout=1&timeout=2",
            "sqlite:///x.db?plugin=x",
            "postgresql://u:p@a:1,b:port/n",
            "postgresql://[::1]:1,[::2]:2/n",
        ],
        "is not UTF-8 text": ["postgresql://u:p\udcff@h/n"],
        "does not know: nonsense": ["postgresql://h/n?nonsense=1"],
        "set DATABASE_POOLER=transaction": ["postgresql://h/n?pgbouncer=true"],
        "unknown value for ssl": ["postgresql://h/n?ssl=yes"],
        "in-memory": [
            "sqlite://",
            "sqlite:///:memory:",
            "sqlite:///file:x?mode=memory&uri=true",
            "sqlite:///file::memory:?uri=true",
        ],
    },
    "CLERK_JWT_KEY": {
        "is not a PEM public key": [
            PEM[:200],
            BODY[:99],
            "x",
            PEM.replace("M", "!"),
            '""',
            "é",
            PEM + PEM[:200],
            PEM[99:] + PEM,
        ],
        "is not an RSA key": [EC_PEM, SHORT_PEM, PEM + EC_PEM],
        "contains a private key": [PRIVATE_PEM, PEM + PRIVATE_PEM],
    },
    "CLERK_PUBLISHABLE_KEY": {
        "is not a publishable key": [
            *(
                "pk_live_",
                "pk_live_x",
                "sk_live_YS5iJA",
                whsec(24),
                publishable("a.b$", "prod"),
                publishable("a.b$")[:-3] + "B==",
            ),
            *(publishable(text) for text in ("a.b", "a b$", "é$", "$", "a.b/$", "a.b$$", "A.b$")),
        ],
    },
    "CLERK_SECRET_KEY": {
        "is not a secret key": ["sk_live_", "pk_live_x", "sk_x", "sk_live_a-b", "x"]
    },
    "CLERK_AUTHORIZED_PARTIES": {
        "is not": [
            *BAD_URLS[""],
            *BAD_URLS["path"],
            "https://a.b/",
            "https://A.b",
            "HTTPS://a.b",
            "https://*.a.b",
            "https://a.b:",
            "null",
        ],
        "is an http:// URL to another": [*BAD_URLS["http"], "https://a.b,http://a.b"],
        "is not a URL such as https://host": ["Native", "NATIVE"],
        "which browsers omit": ["https://a.b:443", "http://localhost:80"],
        "contains no entries": [",", ", ,"],
    },
    "CLERK_AUDIENCE": {"contains no entries": [","]},
    "CONSOLE_PASSWORD": {
        "must be at least 16": [
            "x",
            "fifteen-letters",
            " " * 5 + "fifteen-letters",
            "sixteen letters and blanks",
            "sixteen\u202echaracters",
            "sixteen\tcharacters",
        ]
    },
    "PORT": {"must be a number from 1 to 65535": ["0", "65536", "-1", "8e3", "x", "٣", "1" * 5000]},
    "WEB_CONCURRENCY": {"must be a number from 1 to 512": ["0", "513", "auto"]},
    "DATABASE_POOL_SIZE": {"must be a number from 1 to 100": ["0", "101", "-5", "5.0", "many"]},
    "CLERK_JWKS_KEEP_HOURS": {"must be a number from 1 to 168": ["0", "169", "1.5"]},
    "CLERK_FOLLOW": {
        "must be a number of seconds": ["x", "-1", "1e3", "1,5"],
        "must be 0, or from 0.1 to 3600": ["0.09", "3601"],
    },
    "LOG_FORMAT": {"must be json or text": ["JSON", "xml"]},
    "DATABASE_POOLER": {"must be session or transaction": ["statement", "pgbouncer", "1"]},
    "METRICS_TOKEN": {
        "must be at least 16": ["x", "fifteen-of-them", "with a blank in it", "sixteen-of-them-é"]
    },
} | {
    name: {
        "is not": [*BAD_URLS[""], *BAD_URLS["path"], "ftp://a.b", "https://a b", "https://*.a.b"],
        "is an http:// URL to another": BAD_URLS["http"],
    }
    for name in ("CLERK_ISSUER", "CLERK_API_URL", "CLERK_JWKS_URL")
}


@pytest.mark.parametrize(
    ("variable", "problem", "value"),
    [
        pytest.param(variable, problem, value, id=f"{variable}-{problem}-{number}")
        for variable, kinds in BAD.items()
        for problem, values in kinds.items()
        for number, value in enumerate(values)
    ],
)
def test_refuses_an_invalid_value(variable: str, problem: str, value: str) -> None:
    """The only fault names the variable and states the problem."""
    found = faults(**{variable: value})
    assert list(found) == [variable]
    assert problem in found[variable]


def test_refuses_a_folder_that_it_may_not_look_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inaccessible folder is reported like any other fault."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "stat", refuse)
    assert list(faults(DATABASE_URL="sqlite:////root/secret/x.db")) == ["DATABASE_URL"]


PLATFORMS = ("DYNO", "RENDER", "RAILWAY_PROJECT_ID", "FLY_APP_NAME", "K_SERVICE")


@pytest.mark.parametrize("variable", PLATFORMS)
def test_needs_a_database_on_a_platform(variable: str) -> None:
    """DATABASE_URL is required: on an ephemeral file system, a SQLite file would be lost."""
    assert "do not persist" in faults(**{variable: "x"})["DATABASE_URL"]
    assert "is not a database URL" in faults(**{variable: "x"}, DATABASE_URL="x")["DATABASE_URL"]
    assert read(**{variable: "x"}, DATABASE_URL="sqlite:////tmp/x.db").database_url


def test_uses_sqlite_on_a_platform_with_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite is accepted if a persistent volume is mounted at the instance folder."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "instance")
    assert read(FLY_APP_NAME="x").database_url == DEFAULT_DATABASE_URL


SPELLINGS = {
    "postgres://h/n?ssl=true": "postgresql+psycopg://h/n?sslmode=require",
    "postgres://h/n?ssl=1": "postgresql+psycopg://h/n?sslmode=require",
    "postgres://h/n?ssl=false": "postgresql+psycopg://h/n?sslmode=disable",
    "postgres://h/n?ssl=true&sslmode=verify-full": "postgresql+psycopg://h/n?sslmode=verify-full",
    "postgres://h/n?sslmode=no-verify": "postgresql+psycopg://h/n?sslmode=require",
    "postgresql://u:p@a:1,b:2/n": "postgresql+psycopg://u:p@/n?host=a%3A1&host=b%3A2",
    "postgresql://a,b/n?target_session_attrs=read-write": (
        "postgresql+psycopg:///n?host=a&host=b&target_session_attrs=read-write"
    ),
    "postgresql://u:p,q@h/n": "postgresql+psycopg://u:p%2Cq@h/n",
    "postgresql://u:p,q/r@h/n": "postgresql+psycopg://u:p%2Cq%2Fr@h/n",
    "postgresql://u:p,q@a,b/n": "postgresql+psycopg://u:p%2Cq@/n?host=a&host=b",
    "postgres://u@%2Frun%2Fpg:1/n": "postgresql+psycopg://u@:1/n?host=%2Frun%2Fpg",
    "postgres://u@h/my%20n": "postgresql+psycopg://u@h/my n",
    "postgresql+psycopg://u@/n?host=a:1&host=b:2": (
        "postgresql+psycopg://u@/n?host=a%3A1&host=b%3A2"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_translates_other_spellings_of_a_database_url(spelling: str) -> None:
    """Hosting providers and node-postgres use forms that libpq or SQLAlchemy refuses."""
    assert read(DATABASE_URL=spelling).database_url == SPELLINGS[spelling]


def test_lists_every_fault_at_once() -> None:
    """One message states each variable's problem and says where to find the right value."""
    environ = {variable: next(iter(kinds.values()))[0] for variable, kinds in BAD.items()}
    with pytest.raises(SettingsError) as refused:
        ServiceSettings.from_mapping(environ)
    assert {fault.variable for fault in refused.value.faults} == set(BAD)
    for fault in refused.value.faults:
        assert f"{fault.variable} {fault.problem}\n      {VARIABLES[fault.variable]}" in str(
            refused.value
        )


def test_names_the_missing_secret() -> None:
    """With an empty environment, the message says where to find the required secret."""
    with pytest.raises(SettingsError, match=r"CLERK_WEBHOOK_SECRET is not set.\n.*Signing Secret"):
        ServiceSettings.from_mapping({})


def test_names_the_variable_that_was_read() -> None:
    """If the value comes from the fallback variable, the fault names that variable."""
    assert list(faults(CLERK_WEBHOOK_SECRET="", CLERK_WEBHOOK_SIGNING_SECRET="x")) == [
        "CLERK_WEBHOOK_SIGNING_SECRET"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(PEM.replace("\n", broken) for broken in ("\n", "\\n", "\r\n", "\\r\\n", "", " ")),
        *(
            BODY,
            "\n".join(PEM.splitlines()[1:-1]),
            f'"{PEM}"',
            f"'{PEM.strip()}'",
            PKCS1_PEM,
            "A comment.\n" + PEM,
        ),
    ],
)
def test_reads_a_key_with_changed_line_breaks(text: str) -> None:
    """A key is accepted with changed line breaks, or as the bare base64 body of a PEM block."""
    assert read(CLERK_JWT_KEY=text).jwt_keys == (CLERK.private_key.public_key(),)


@pytest.mark.parametrize("separator", ["", "\n", "\\n", " ", ","])
@pytest.mark.parametrize(
    "mangle", [str, lambda pem: pem.replace("\n", ""), lambda pem: pem.replace("\n", "\\n")]
)
def test_reads_several_keys(separator: str, mangle: Any) -> None:
    """During a rotation, the variable contains several keys."""
    keys = read(CLERK_JWT_KEY=mangle(PEM) + separator + mangle(OTHER_PEM)).jwt_keys
    assert keys == (CLERK.private_key.public_key(), OTHER.private_key.public_key())


def test_shows_no_secret_in_its_repr() -> None:
    """The representation may appear in a traceback, so it must not contain secrets."""
    environ = CLERK.environ | {
        "DATABASE_URL": "postgres://user:password@host/n",
        "CLERK_SECRET_KEY": "sk_live_abc",
        "DYNO": "web.1",
    }
    environ |= {
        "METRICS_TOKEN": "hidden-metrics-token",
        "CONSOLE_PASSWORD": "hidden-console-password",
    }
    shown = repr(ServiceSettings.from_mapping(environ))
    for part in (
        *(CLERK.environ[name] for name in ("CLERK_WEBHOOK_SECRET", "CLERK_JWT_KEY")),
        repr(CLERK.secret),
        "password",
        "sk_live",
        "hidden",
        "RSA",
    ):
        assert part not in shown


marked = st.tuples(
    *[
        st.text(max_size=8)
        | st.sampled_from(
            [
                "whsec_",
                "pk_live_",
                "https://",
                "sqlite:///",
                "postgres://h:",
                ",",
                "http://[",
                "?",
                ":",
            ]
        )
    ]
    * 2
)


@given(st.dictionaries(st.sampled_from(sorted(VARIABLES)), marked.map("Zq7Xj9".join)))
def test_never_shows_a_value(environ: dict[str, str]) -> None:
    """No message quotes a value, and no exception other than SettingsError is raised."""
    try:
        ServiceSettings.from_mapping(environ)
    except SettingsError as error:
        shown = str(error) + repr(error) + repr(error.faults)
        assert "zq7xj9" not in shown.lower()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without clerkhooks' variables, and a project without a .env file."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(service, "read_environ", lambda: read_environ(tmp_path))
    return monkeypatch


def exit_message(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message that ``create_app()`` prints before it exits with status 2."""
    with pytest.raises(SystemExit) as end:
        create_app()
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert shown.err.startswith("clerkhooks cannot start. Please correct:\n")
    return shown.err


def test_loads_the_env_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .env beside wsgi.py is read. Environment variables win, even if they are empty."""
    lines = [f"CLERK_WEBHOOK_SECRET={whsec(24)}", "PORT=1", "WEB_CONCURRENCY=3", "LOG_FORMAT=text"]
    (tmp_path / ".env").write_text("\n".join(lines))
    environment.setenv("PORT", "2")
    environment.setenv("LOG_FORMAT", "")
    read = read_environ(tmp_path)
    loaded = ServiceSettings.from_mapping(read)
    assert (loaded.webhook_secrets, loaded.port, loaded.web_concurrency) == ((b"s" * 24,), 2, 3)
    assert loaded.log_format == "auto"
    assert read["PATH"] == os.environ["PATH"]


def test_leaves_the_environment_alone(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .env is read into a mapping, so other code in the process does not see it."""
    (tmp_path / ".env").write_text("PORT=1\nexport LOG_FORMAT='text'\nCLERK_AUDIENCE\n")
    before = dict(os.environ)
    assert (
        read_environ(tmp_path) == {"PORT": "1", "LOG_FORMAT": "text", "CLERK_AUDIENCE": ""} | before
    )
    assert dict(os.environ) == before


def test_needs_no_env_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a .env, only environment variables are read."""
    assert read_environ(tmp_path) == dict(os.environ)


def test_creates_the_service_from_the_environment(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``create_app()`` reads both the environment and the .env file."""
    (tmp_path / ".env").write_text(f"CLERK_WEBHOOK_SECRET={whsec(24)}\nDATABASE_POOL_SIZE=3\n")
    environment.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/x.db")
    app = create_app()
    state: State = app.extensions["clerkhooks"]
    assert (state.settings.webhook_secrets, state.settings.pool_size) == ((b"s" * 24,), 3)
    assert app.config["SQLALCHEMY_DATABASE_URI"] == f"sqlite:///{tmp_path}/x.db"
    disconnect(app)


def test_ends_with_status_2_and_the_message(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service does not start, and the message is printed to stderr."""
    environment.setenv("PORT", "x")
    message = exit_message(capsys)
    assert "CLERK_WEBHOOK_SECRET is not set." in message
    assert "PORT must be a number" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("PORT=ü".encode("utf-16"), ".env is not UTF-8 text"),
        (b"PORT=1\0\n", ".env cannot be read"),
        (None, ".env cannot be read"),
    ],
)
def test_explains_an_env_file_that_is_not_text(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    problem: str,
) -> None:
    """If the file is not UTF-8 or cannot be opened, it is reported without a traceback."""
    environment.setenv("PORT", "1")
    if content is None:  # root can read a file without permissions
        environment.setattr("clerkhooks.settings.dotenv_values", refuse)
    else:
        (tmp_path / ".env").write_bytes(content)
    assert problem in exit_message(capsys)


def refuse(_path: Path) -> dict[str, str | None]:
    """Raise PermissionError, as if the file were unreadable."""
    raise PermissionError


def test_raises_for_a_mapping(environment: pytest.MonkeyPatch) -> None:
    """A caller that passes a configuration gets an exception; the process does not exit."""
    with pytest.raises(SettingsError, match="PORT must be a number"):
        create_app({"CLERK_WEBHOOK_SECRET": whsec(24), "PORT": "x"})
    assert SettingsError.__mro__[1].__name__ == "ClerkhooksError"


def test_reads_nothing_but_the_mapping(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A service that is given a configuration does not read the environment."""
    for name in VARIABLES:
        environment.setenv(name, "x")
    own = {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "CLERK_AUDIENCE": ""}
    app = create_app(CLERK.environ | own)
    state: State = app.extensions["clerkhooks"]
    expected = ServiceSettings.from_mapping(CLERK.environ | own)
    for name in Settings.__dataclass_fields__:
        assert getattr(state.settings, name) == getattr(expected, name)
    disconnect(app)


def settings_of(application: Application) -> Settings:
    """Return the settings of an application, and close its connections."""
    disconnect(application.app)
    return application.state.settings


def test_reads_an_application_before_the_environment(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``app.config`` takes precedence over the environment, unless a value is None or empty."""
    environment.setenv("CLERK_ISSUER", "https://environment.example")
    environment.setenv("CLERK_AUDIENCE", "environment")
    environment.setenv("CLERK_JWKS_KEEP_HOURS", "24")
    environment.setenv("METRICS_TOKEN", "a-token-of-the-environment")
    config: dict[str, Any] = {
        "CLERK_ISSUER": "https://config.example",
        "CLERK_AUDIENCE": None,
        "METRICS_TOKEN": "",
    }
    settings = settings_of(Application(CLERK, f"sqlite:///{tmp_path}/x.db", **config))
    assert settings.issuers == ("https://config.example",)
    assert settings.audience == ("environment",)
    assert settings.jwks_keep_hours == 24
    assert settings.metrics_token == "a-token-of-the-environment"


def test_takes_lists_and_numbers_from_an_application(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``app.config`` may contain lists, tuples, sets and numbers."""
    config: dict[str, Any] = {
        "CLERK_WEBHOOK_SECRET": [whsec(24), whsec(32)],
        "CLERK_JWT_KEY": (PEM, OTHER_PEM),
        "CLERK_ISSUER": ["https://a.b", "https://c.d"],
        "CLERK_AUTHORIZED_PARTIES": ["https://a.b", "native"],
        "CLERK_AUDIENCE": frozenset({"only"}),
        "CLERK_JWKS_KEEP_HOURS": 48,
        "DATABASE_POOL_SIZE": 7,
    }
    application = Application(CLERK, f"sqlite:///{tmp_path}/x.db", **config)
    settings, pool = settings_of(application), application.database.engine.pool
    assert settings.webhook_secrets == (b"s" * 24, b"s" * 32)
    assert len(settings.jwt_keys) == 2
    assert settings.issuers == ("https://a.b", "https://c.d")
    assert settings.authorized_parties == ("https://a.b", "native")
    assert settings.audience == ("only",)
    assert settings.jwks_keep_hours == 48
    assert settings.pool_size == pool.size() == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("empty", [None, "", " ", [], ()])
def test_counts_an_empty_value_as_unset(empty: object) -> None:
    """None, an empty string and an empty sequence count as unset."""
    assert read(PORT=empty, DATABASE_POOL_SIZE=empty).port == 8000
    assert list(faults(CLERK_WEBHOOK_SECRET=empty)) == ["CLERK_WEBHOOK_SECRET"]


def test_does_not_read_the_service_in_an_application(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an application, PORT, DATABASE_URL and a platform's variables are not validated."""
    for name, value in (("PORT", "x"), ("DATABASE_URL", "mysql://h/n"), ("DYNO", "web.1")):
        environment.setenv(name, value)
    settings = settings_of(Application(CLERK, f"sqlite:///{tmp_path}/x.db"))
    assert type(settings) is Settings


def test_lists_every_fault_of_an_application(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``init_app`` raises one SettingsError for all invalid values, whatever their source."""
    environment.setenv("CLERK_ISSUER", "x")
    with pytest.raises(SettingsError) as refused:
        Application(CLERK, f"sqlite:///{tmp_path}/x.db", DATABASE_POOL_SIZE=0, METRICS_TOKEN=7)
    variables = {fault.variable for fault in refused.value.faults}
    assert variables == {"CLERK_ISSUER", "DATABASE_POOL_SIZE", "METRICS_TOKEN"}


def test_reads_nothing_but_its_variables_from_an_application() -> None:
    """Other keys of ``app.config`` are ignored, and the environment is left unchanged."""
    config = {"SECRET_KEY": "x", "PORT": 1, "LOG_FORMAT": None, "CLERK_AUDIENCE": []}
    values = merge_config(config, {"PORT": "2", "CLERK_AUDIENCE": "a", "HOME": "/root"})
    assert values == {"PORT": 1, "CLERK_AUDIENCE": "a", "HOME": "/root"}


@pytest.mark.parametrize("size", ["1", "4"])
def test_sizes_its_own_pool(make_service: MakeService, size: str) -> None:
    """DATABASE_POOL_SIZE is the size of the private pool, which has no overflow."""
    state: State = make_service(DATABASE_POOL_SIZE=size).app.extensions["clerkhooks"]
    pool: Any = state.store.database.engine.pool
    assert (pool.size(), pool._max_overflow) == (int(size), 0)


def test_accepts_every_issuer(make_service: MakeService) -> None:
    """Tokens from each listed issuer are accepted; tokens from other issuers are refused."""
    both = make_service(CLERK_ISSUER="https://a.example, https://b.example")
    for issuer, status in (("https://a.example", 200), ("https://b.example", 200), (None, 401)):
        assert both.call("user_2abc", iss=issuer).status_code == status
    refused = both.call("user_2abc", iss="https://clerk.example.com")
    assert refused.get_json()["reason"] == "token_issuer_mismatch"


IMPORT = """
import logging, os, sys, threading

class Environ(dict):
    def refuse(self, name):
        assert not name.startswith(("CLERK_", "DATABASE_", "METRICS_", "LOG_")), name
        assert name not in ("PORT", "WEB_CONCURRENCY", "DYNO", "CONSOLE_PASSWORD"), name

    def __getitem__(self, name):
        self.refuse(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.refuse(name)
        return super().__contains__(name)

    def get(self, name, default=None):
        self.refuse(name)
        return super().get(name, default)

before = dict(os.environ)
os.environ = Environ(before)
import clerkhooks
for name in clerkhooks.__all__:
    getattr(clerkhooks, name)
assert set(dict.items(os.environ)) == set(before.items())
heavy = {"clerkhooks.payloads", "gevent", "gunicorn", "prometheus_client", "pytest", "svix"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in (None, "clerkhooks"):
    assert not logging.getLogger(name).handlers
assert logging.getLogger("clerkhooks").level == logging.NOTSET
assert threading.active_count() == 1
"""


def run_python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a separate process, in *folder*."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environ(**variables), capture_output=True, text=True, timeout=60
    )


def test_has_no_side_effect_when_it_is_imported(tmp_path: Path) -> None:
    """
    Importing clerkhooks reads no environment variables and loads no large libraries.

    It adds no log handlers and starts no threads.
    """
    ended = run_python(IMPORT, tmp_path, **dict.fromkeys(VARIABLES, "wrong"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_loads_its_modules_on_first_use(tmp_path: Path) -> None:
    """``import clerkhooks`` loads no submodules, so gunicorn.conf.py can monkey-patch first."""
    code = "import sys, clerkhooks; print([n for n in sys.modules if n.startswith('clerkhooks.')])"
    ended = run_python(code, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")
