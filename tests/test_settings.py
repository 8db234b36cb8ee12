"""Configuration: every value that cannot work is named at once, and none is ever shown."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks import settings as settings_module
from clerkhooks.cli.pretend import PretendedClerk
from clerkhooks.errors import SettingsError
from clerkhooks.settings import VARIABLES, Settings, load_settings

CLERK, OTHER = PretendedClerk(), PretendedClerk()
PEM, OTHER_PEM = CLERK.public_key_pem, OTHER.public_key_pem
BODY = "".join(PEM.splitlines()[1:-1])
EC_PEM = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
SHORT_KEY = rsa.generate_private_key(65537, 1024).public_key()
SHORT_PEM = SHORT_KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
PKCS1_PEM = CLERK.private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1).decode()
PRIVATE_PEM = CLERK.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def whsec(length: int, byte: bytes = b"s") -> str:
    return "whsec_" + base64.b64encode(byte * length).decode()


def publishable(text: str, kind: str = "live") -> str:
    return f"pk_{kind}_" + base64.b64encode(text.encode()).decode()


def read(**environ: str) -> Settings:
    """The settings of a service that has a signing secret and these variables."""
    return Settings.from_environ({"CLERK_WEBHOOK_SECRET": whsec(24)} | environ)


def faults(**environ: str) -> dict[str, str]:
    """What is wrong, by variable."""
    with pytest.raises(SettingsError) as refused:
        read(**environ)
    assert refused.value.reason == "invalid_settings"
    return {fault.variable: fault.problem for fault in refused.value.faults}


def test_needs_a_signing_secret_only() -> None:
    """All other variables have defaults."""
    assert read() == Settings(webhook_secrets=(b"s" * 24,))


def test_counts_an_empty_variable_as_unset() -> None:
    """Platforms set variables to nothing."""
    assert read(**dict.fromkeys(set(VARIABLES) - {"CLERK_WEBHOOK_SECRET"}, "")) == read()
    assert read(**dict.fromkeys(set(VARIABLES) - {"CLERK_WEBHOOK_SECRET", "DYNO"}, " \n")) == read()


@pytest.mark.parametrize(
    ("environ", "field", "value"),
    [
        ({"CLERK_WEBHOOK_SECRET": whsec(24).removeprefix("whsec_")}, "webhook_secrets", (b"s" * 24,)),
        ({"CLERK_WEBHOOK_SECRET": whsec(64)}, "webhook_secrets", (b"s" * 64,)),
        ({"CLERK_WEBHOOK_SECRET": f" {whsec(24)}, {whsec(64)}\n{whsec(32)}"}, "webhook_secrets", (b"s" * 24, b"s" * 64, b"s" * 32)),
        ({"CLERK_WEBHOOK_SIGNING_SECRET": whsec(24, b"b")}, "webhook_secrets", (b"s" * 24,)),
        ({"CLERK_WEBHOOK_SECRET": " ", "CLERK_WEBHOOK_SIGNING_SECRET": whsec(24, b"b")}, "webhook_secrets", (b"b" * 24,)),
        ({"DATABASE_URL": "postgres://u:p@h/n"}, "database_url", "postgresql+psycopg://u:p@h/n"),
        ({"DATABASE_URL": "postgresql://u:p%40@h:5/n?sslmode=require"}, "database_url", "postgresql+psycopg://u:p%40@h:5/n?sslmode=require"),
        ({"DATABASE_URL": "postgresql+psycopg://h/n"}, "database_url", "postgresql+psycopg://h/n"),
        ({"DATABASE_URL": "sqlite:////tmp/x.db"}, "database_url", "sqlite:////tmp/x.db"),
        ({"DATABASE_URL": "sqlite+pysqlite:///x.db"}, "database_url", "sqlite+pysqlite:///x.db"),
        ({"DATABASE_URL": "postgres://h/n", "DYNO": "web.1"}, "database_url", "postgresql+psycopg://h/n"),
        ({"CLERK_PUBLISHABLE_KEY": publishable("clerk.example.com$")}, "issuer", "https://clerk.example.com"),
        ({"CLERK_PUBLISHABLE_KEY": publishable("a-b.example$", "test").rstrip("=")}, "issuer", "https://a-b.example"),
        ({"CLERK_PUBLISHABLE_KEY": publishable("a.b$"), "CLERK_ISSUER": "https://c.d/"}, "issuer", "https://c.d"),
        ({"CLERK_ISSUER": "https://a.example:8443/path"}, "issuer", "https://a.example:8443/path"),
        *(({"CLERK_ISSUER": f"http://{host}"}, "issuer", f"http://{host}") for host in ("127.0.0.2:3", "[::1]:5", "a.localhost")),
        ({"CLERK_SECRET_KEY": "sk_test_aB3", "CLERK_API_URL": "https://a.b", "CLERK_JWKS_URL": "https://a.b/jwks"}, "issuer", None),
        ({"CLERK_AUTHORIZED_PARTIES": "https://a.b, http://localhost:3000"}, "authorized_parties", ("https://a.b", "http://localhost:3000")),
        ({"CLERK_AUTHORIZED_PARTIES": "chrome-extension://abc"}, "authorized_parties", ("chrome-extension://abc",)),
        ({"CLERK_AUDIENCE": "a,b c"}, "audience", ("a", "b", "c")),
        *(({"PORT": str(port)}, "port", port) for port in (1, 65535)),
        *(({"WEB_CONCURRENCY": str(count)}, "web_concurrency", count) for count in (1, 512)),
    ],
)  # fmt: skip
def test_reads_a_good_value(environ: dict[str, str], field: str, value: Any) -> None:
    """Every form that the contract names."""
    assert getattr(read(**environ), field) == value


BAD_URLS = {
    "": ["https://", "https:", "//a.b", "a.b", "https://u:p@a.b", "https://@a.b", "https://a.b:x", "https://a.b:70000", "https://[::1"],
    "http": ["http://a.b", "http://localhost.a.b", "http://128.0.0.1", "http://0.0.0.0"],
    "path": ["https://a.b?x", "https://a.b#x", "https://a.b?", "https://a.b#"],
}  # fmt: skip
BAD = {
    "CLERK_WEBHOOK_SECRET": {
        "is an API key": ["sk_test_abc", "pk_test_abc", f"{whsec(24)},sk_live_x"],
        "24 to 64 bytes": [whsec(23), whsec(65), "whsec_", whsec(24) + "," + whsec(23)],
        "whsec_ and base64": [whsec(25)[:-3] + "x==", whsec(25)[:-2], whsec(24) + "!", "whsec_é", "x_" + whsec(24), "-_" * 20],
        "nothing but separators": [",", " , "],
    },
    "DATABASE_URL": {
        "is not a database URL": ["x", "postgres://h:port/n", "://", "postgres:/h"],
        "not supported": ["mysql://h/n", "postgresql+psycopg2://h/n", "sqlite+aiosqlite:///x"],
        "in a folder that is not there": ["sqlite:////nonexistent/x.db", "sqlite:///file:/nonexistent/x.db?uri=true"],
        "libpq takes": ["postgresql://h/n?nonsense=1"],
        "in memory": ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "sqlite:///file::memory:?uri=true"],
    },
    "CLERK_JWT_KEY": {
        "is not a PEM public key": [PEM[:200], BODY[:99], "x", PEM.replace("M", "!"), '""', "é", PEM + PEM[:200], PEM[99:] + PEM],
        "is not an RSA key": [EC_PEM, SHORT_PEM, PEM + EC_PEM],
        "holds a private key": [PRIVATE_PEM, PEM + PRIVATE_PEM],
    },
    "CLERK_PUBLISHABLE_KEY": {
        "is not a publishable key": [
            *("pk_live_", "pk_live_x", "sk_live_YS5iJA", whsec(24), publishable("a.b$", "prod"), publishable("a.b$")[:-3] + "B=="),
            *(publishable(text) for text in ("a.b", "a b$", "é$", "$", "a.b/$", "a.b$$", "A.b$")),
        ],
    },
    "CLERK_SECRET_KEY": {"is not a secret key": ["sk_live_", "pk_live_x", "sk_x", "sk_live_a-b", "x"]},
    "CLERK_AUTHORIZED_PARTIES": {
        "is not": [*BAD_URLS[""], *BAD_URLS["path"], "https://a.b/", "https://A.b", "HTTPS://a.b", "https://*.a.b", "https://a.b:", "null"],
        "is http:// to another machine": [*BAD_URLS["http"], "https://a.b,http://a.b"],
        "browsers leave out": ["https://a.b:443", "http://localhost:80"],
        "nothing but separators": [",", ", ,"],
    },
    "CLERK_AUDIENCE": {"nothing but separators": [","]},
    "CONSOLE_PASSWORD": {"is not 12 or more": ["x", "elevenchars", " " * 5 + "elevenchars", "twelve\u202echars", "twelve\tchars!"]},
    "PORT": {"is not a number from 1 to 65535": ["0", "65536", "-1", "8e3", "x", "٣", "1" * 5000]},
    "WEB_CONCURRENCY": {"is not a number from 1 to 512": ["0", "513", "auto"]},
} | {
    name: {
        "is not": [*BAD_URLS[""], *BAD_URLS["path"], "ftp://a.b", "https://a b", "https://*.a.b"],
        "is http:// to another machine": BAD_URLS["http"],
    }
    for name in ("CLERK_ISSUER", "CLERK_API_URL", "CLERK_JWKS_URL")
}  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "problem", "value"),
    [
        pytest.param(variable, problem, value, id=f"{variable}-{problem}-{number}")
        for variable, kinds in BAD.items()
        for problem, values in kinds.items()
        for number, value in enumerate(values)
    ],
)
def test_refuses_a_value_that_cannot_work(variable: str, problem: str, value: str) -> None:
    """One fault, of that variable, saying what is wrong."""
    found = faults(**{variable: value})
    assert list(found) == [variable]
    assert problem in found[variable]


def test_needs_a_database_on_a_platform() -> None:
    """A disk that is thrown away loses every user at the next restart."""
    assert "throws its disk away" in faults(DYNO="web.1")["DATABASE_URL"]
    assert "is not a database URL" in faults(DYNO="web.1", DATABASE_URL="x")["DATABASE_URL"]


def test_lists_every_fault_at_once() -> None:
    """One message, with what is wrong with each variable and where the right value is found."""
    environ = {variable: next(iter(kinds.values()))[0] for variable, kinds in BAD.items()}
    with pytest.raises(SettingsError) as refused:
        Settings.from_environ(environ)
    assert {fault.variable for fault in refused.value.faults} == set(BAD)
    for fault in refused.value.faults:
        assert f"{fault.variable} {fault.problem}\n      {VARIABLES[fault.variable]}" in str(refused.value)


def test_names_the_missing_secret() -> None:
    """An empty environment says what is required, and where it is found."""
    with pytest.raises(SettingsError, match=r"CLERK_WEBHOOK_SECRET is not set.\n.*Signing Secret"):
        Settings.from_environ({})


def test_names_the_variable_that_was_read() -> None:
    """A fault of the fallback is not blamed on the first."""
    assert list(faults(CLERK_WEBHOOK_SECRET="", CLERK_WEBHOOK_SIGNING_SECRET="x")) == ["CLERK_WEBHOOK_SIGNING_SECRET"]


@pytest.mark.parametrize(
    "text",
    [
        *(PEM.replace("\n", broken) for broken in ("\n", "\\n", "\r\n", "\\r\\n", "", " ")),
        *(BODY, "\n".join(PEM.splitlines()[1:-1]), f'"{PEM}"', f"'{PEM.strip()}'", PKCS1_PEM, "A comment.\n" + PEM),
    ],
)  # fmt: skip
def test_reads_a_mangled_key(text: str) -> None:
    """Platforms mangle line breaks; the key is the same."""
    assert read(CLERK_JWT_KEY=text).jwt_keys == (CLERK.private_key.public_key(),)


@pytest.mark.parametrize("separator", ["", "\n", "\\n", " ", ","])
@pytest.mark.parametrize("mangle", [str, lambda pem: pem.replace("\n", ""), lambda pem: pem.replace("\n", "\\n")])
def test_reads_several_keys(separator: str, mangle: Any) -> None:
    """One after the other, while a key is rotated."""
    keys = read(CLERK_JWT_KEY=mangle(PEM) + separator + mangle(OTHER_PEM)).jwt_keys
    assert keys == (CLERK.private_key.public_key(), OTHER.private_key.public_key())


def test_shows_no_secret_in_its_repr() -> None:
    """Settings end up in tracebacks."""
    environ = CLERK.environ | {"DATABASE_URL": "postgres://user:password@host/n", "CLERK_SECRET_KEY": "sk_live_abc", "DYNO": "web.1"}
    environ |= {"METRICS_TOKEN": "hidden-metrics-token", "CONSOLE_PASSWORD": "hidden console password"}
    shown = repr(Settings.from_environ(environ))
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
    *[st.text(max_size=8) | st.sampled_from(["whsec_", "pk_live_", "https://", "sqlite:///", "postgres://h:", ",", "http://[", "?", ":"])]
    * 2
)


@given(st.dictionaries(st.sampled_from(sorted(VARIABLES)), marked.map("Zq7Xj9".join)))
def test_never_shows_a_value(environ: dict[str, str]) -> None:
    """No message quotes what it refuses, and nothing but SettingsError comes out."""
    try:
        Settings.from_environ(environ)
    except SettingsError as error:
        shown = str(error) + repr(error) + repr(error.faults)
        assert "zq7xj9" not in shown.lower()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without any of our variables, in a project without a .env file."""
    monkeypatch.setattr(settings_module, "PROJECT", tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_loads_the_env_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .env beside wsgi.py is read; real variables win."""
    (tmp_path / ".env").write_text(f"CLERK_WEBHOOK_SECRET={whsec(24)}\nPORT=1\nWEB_CONCURRENCY=3\n")
    environment.setenv("PORT", "2")
    loaded = load_settings()
    assert (loaded.webhook_secrets, loaded.port, loaded.web_concurrency) == ((b"s" * 24,), 2, 3)


def test_ends_with_status_2_and_the_message(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing starts; the message is for a person, on stderr."""
    environment.setenv("PORT", "x")
    with pytest.raises(SystemExit) as ended:
        load_settings()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert shown.err.startswith("clerkhooks cannot start. Please correct:\n")
    assert "CLERK_WEBHOOK_SECRET is not set." in shown.err
    assert "PORT is not a number" in shown.err


def test_explains_an_env_file_that_is_no_text(environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file saved in another encoding is named, without a traceback."""
    environment.setenv("PORT", "1")
    (tmp_path / ".env").write_bytes("PORT=ü".encode("utf-16"))
    with pytest.raises(SystemExit) as ended:
        load_settings()
    assert ended.value.code == 2
    assert ".env is not text in UTF-8" in capsys.readouterr().err
