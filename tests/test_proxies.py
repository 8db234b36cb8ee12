"""Requests to Clerk use the environment's proxy; requests to loopback addresses do not."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.download import download
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.signing_keys import fetch_key_set
from clerkhooks.cli.main import main
from clerkhooks.errors import BackendApiError, ProxyUrlError
from tests import proxy
from tests.backend import Backend
from tests.conftest import MigratedUrl
from tests.issuer import Issuer, jwk, key_set
from tests.proxy import Proxy, Tunnel
from tests.server import serving
from tests.support import user_event

HOST = "clerk.example.com"
API = f"https://{HOST}"
SECRET_KEY = "sk_test_0123456789abcdef"
INVALID = ["foo://user:hidden@proxy", "socks4://proxy:1080", "http://hidden:::", "http://ü..:80"]
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
MakeProxy = Callable[[Tunnel], Proxy]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the proxy variables of the machine that runs the tests."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def make_proxy(
    tmp_path: Path, clerk: FakeClerk, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeProxy]:
    """Start a proxy that responds to requests for any host as Clerk would."""
    certificate = tmp_path / "certificate.pem"
    proxy.write_certificate(certificate, HOST)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    answers = {
        "/v1/users/count": {"total_count": 0},
        "/v1/users": [],
        "/jwks": json.loads(key_set(jwk(clerk))),
        "/webhooks": {"outcome": "applied"},
    }
    with ExitStack() as stack:
        yield lambda tunnel: stack.enter_context(Proxy(tunnel, certificate, answers).open())


WORKING = [
    (proxy.connect, "https_proxy", "http://{}", f"CONNECT {HOST}:443"),
    (proxy.connect, "HTTPS_PROXY", "{}", f"CONNECT {HOST}:443"),
    (proxy.connect, "ALL_PROXY", "http://user:secret@{}", f"CONNECT {HOST}:443"),
    (proxy.socks, "ALL_PROXY", "socks5://{}", f"SOCKS {HOST}:443"),
    (proxy.socks, "ALL_PROXY", "socks5://user:secret@{}", f"SOCKS {HOST}:443"),
    (proxy.socks, "https_proxy", "socks5h://{}", f"SOCKS {HOST}:443"),
]


@pytest.mark.parametrize(("tunnel", "variable", "url", "target"), WORKING)
def test_asks_clerk_through_the_proxy(
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    tunnel: Tunnel,
    variable: str,
    url: str,
    target: str,
) -> None:
    """Requests use HTTP and SOCKS proxies, verify TLS, and do not resolve host names locally."""
    through = make_proxy(tunnel)
    monkeypatch.setenv(variable, url.format(through.address))
    with BackendApi(API, SECRET_KEY, patience=2) as api:
        assert api.count_users() == 0
        assert list(fetch_key_set(f"{API}/jwks", {})) == ["ins_fake"]
    assert through.targets == [target] * 2


def test_verifies_the_certificate_behind_a_proxy(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate for another host or from an unknown authority ends the connection."""
    through = make_proxy(proxy.connect)
    monkeypatch.setenv("https_proxy", f"http://{through.address}")
    with pytest.raises(httpx.ConnectError):
        download("https://clerk.example.org/jwks", {}, timeout=5, max_size=1000)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(httpx.ConnectError):
        download(f"{API}/jwks", {}, timeout=5, max_size=1000)
    assert len(through.targets) == 2


@pytest.mark.parametrize("excepted", [HOST, ".example.com", "*", f"other.example,{HOST}"])
def test_asks_no_proxy_for_excepted_hosts(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    """NO_PROXY may list hosts and domains."""
    through = make_proxy(proxy.connect)
    monkeypatch.setenv("https_proxy", f"http://{through.address}")
    monkeypatch.setenv("NO_PROXY", excepted)
    with pytest.raises((httpx.HTTPError, TimeoutError)):  # the host does not exist
        download(f"{API}/jwks", {}, timeout=2, max_size=1000)
    assert through.targets == []


@pytest.mark.parametrize("url", ["http://{}", "socks5://{}", INVALID[0]])
def test_asks_no_proxy_for_this_machine(
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    clerk: FakeClerk,
    backend: Backend,
    url: str,
) -> None:
    """Loopback addresses bypass the proxy, so even an invalid proxy URL does no harm."""
    through = make_proxy(proxy.connect)
    for variable in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, url.format(through.address))
    with (
        Issuer(jwk(clerk)).open() as issuer,
        BackendApi(backend.api_url, backend.secret_key, patience=2) as api,
    ):
        assert api.count_users() == 0
        assert list(fetch_key_set(issuer.url, {})) == ["ins_fake"]
        assert fetch_key_set(issuer.url.replace("127.0.0.1", "localhost"), {})
    assert through.targets == []


REFUSING = [proxy.refuse, proxy.socks_refusing, proxy.garbled, proxy.hanging_up, proxy.stalling]
NOISY = [
    *((tunnel, "http") for tunnel in REFUSING),
    (proxy.socks_refusing, "socks5"),
    *(
        pytest.param(tunnel, "socks5", marks=pytest.mark.slow)
        for tunnel in REFUSING
        if tunnel is not proxy.socks_refusing
    ),
]


@pytest.mark.parametrize(("tunnel", "scheme"), NOISY)
def test_reports_a_proxy_that_does_not_connect(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch, tunnel: Tunnel, scheme: str
) -> None:
    """Every failure is reported as ``api_unreachable`` and leaves no socket open."""
    through = make_proxy(tunnel)
    monkeypatch.setenv("https_proxy", f"{scheme}://{through.address}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with (
            pytest.raises(BackendApiError) as raised,
            BackendApi(API, SECRET_KEY, patience=0.2, timeout=0.5) as api,
        ):
            api.count_users()
        assert raised.value.reason == "api_unreachable"
        del raised
        gc.collect()
    assert through.targets
    assert [str(warning.message) for warning in warned] == []


def test_reports_an_unusable_password(
    monkeypatch: pytest.MonkeyPatch, make_proxy: MakeProxy
) -> None:
    """A SOCKS password over 255 bytes or a proxy host with an empty label raises an error."""
    through = make_proxy(proxy.socks_password)
    for url in (f"socks5://user:{'x' * 300}@{through.address}", "socks5://a..b:1080"):
        monkeypatch.setenv("ALL_PROXY", url)
        with pytest.raises(httpx.TransportError):
            download(f"{API}/jwks", {}, timeout=5, max_size=1000)


@pytest.mark.parametrize("value", INVALID)
def test_explains_an_invalid_proxy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The error names the variables that are set and does not show their values."""
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(ProxyUrlError, match=r"https_proxy is invalid\.\nUse a URL") as raised:
        download(f"{API}/jwks", {}, timeout=5, max_size=1000)
    assert "hidden" not in str(raised.value)
    with BackendApi(API, SECRET_KEY) as api, pytest.raises(BackendApiError) as failed:
        api.count_users()
    assert str(failed.value).startswith(
        "Clerk's Backend API was not called: https_proxy is invalid."
    )


def run(*arguments: str) -> Result:
    """Run a command of the service."""
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def configured(
    migrated_url: MigratedUrl, clerk: FakeClerk, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Set the variables of a service whose Clerk API is on another machine."""
    variables = clerk.environ | {
        "DATABASE_URL": migrated_url("sqlite"),
        "CLERK_SECRET_KEY": SECRET_KEY,
        "CLERK_API_URL": API,
        "CLERK_JWT_KEY": "",
        "CLERK_JWKS_URL": f"{API}/jwks",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


COMMANDS = [
    (["sync", "--check"], 2),
    (["send", "user.created", "--to", f"{API}/webhooks"], 2),
    (["doctor"], 1),
]


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(("arguments", "status"), COMMANDS)
def test_commands_explain_an_invalid_proxy(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    """The command prints one message and exits with its usual error status."""
    monkeypatch.setenv("HTTPS_PROXY", INVALID[0])
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("HTTPS_PROXY is invalid") == 1
    assert "socks5://proxy.example.com:1080" in result.output
    assert "hidden" not in result.output


@pytest.fixture
def named_proxy(
    request: pytest.FixtureRequest, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> Proxy:
    """A proxy of the parametrized kind, configured in ALL_PROXY."""
    through = make_proxy(request.param)
    scheme = "http" if request.param in (proxy.connect, proxy.refuse) else "socks5"
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://{through.address}")
    return through


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("named_proxy", [proxy.connect, proxy.socks], indirect=True)
def test_commands_use_the_proxy(named_proxy: Proxy) -> None:
    """``sync`` and ``send`` reach other machines through the proxy."""
    assert run("sync", "--check").exit_code == 0
    sent = run("send", "user.created", "--to", f"{API}/webhooks", "--json")
    answer = {"status": 200, "body": '{"outcome": "applied"}'}
    assert json.loads(sent.output)["answers"] == [answer]
    assert len(named_proxy.targets) == 4


@pytest.mark.slow
@SQLITE
def test_send_asks_no_proxy_for_this_machine(
    database_url: str,
    clerk: FakeClerk,
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Requests to the service on the same machine do not use the proxy."""
    through = make_proxy(proxy.connect)
    monkeypatch.setenv("http_proxy", f"http://{through.address}")
    for name, value in (clerk.environ | {"DATABASE_URL": database_url}).items():
        monkeypatch.setenv(name, value)
    with serving(database_url, clerk, tmp_path / "server.log") as server:
        endpoint = f"http://localhost:{server.port}/webhooks/clerk"
        result = run("send", "user.created", "--to", endpoint)
    assert result.exit_code == 0, result.output
    assert through.targets == []


@pytest.mark.usefixtures("configured", "named_proxy")
@pytest.mark.parametrize("named_proxy", [proxy.refuse, proxy.socks_refusing], indirect=True)
def test_send_reports_a_proxy_that_refuses() -> None:
    """The command prints one message and exits with status 2."""
    result = run("send", "user.created", "--to", f"{API}/webhooks")
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert "does not respond (ProxyError)" in result.output


@pytest.mark.slow
@SQLITE
def test_starts_with_an_invalid_proxy(database_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """Webhooks are served, one log line reports the error, and calls get a 503."""
    variables = {"CLERK_JWT_KEY": "", "https_proxy": INVALID[0], "WEB_CONCURRENCY": "1"}
    log = tmp_path / "server.log"
    with serving(database_url, clerk, log, **variables) as server:
        assert server.deliver(user_event(clerk_id("user"))).status == 200
        token = clerk.session_token(clerk_id("user"))
        answer = server.request("GET", "/api/me", headers={"Authorization": f"Bearer {token}"})
        assert (answer.status, answer.json()["reason"]) == (503, "keys_unavailable")
        failed = [line for line in server.lines() if line["event"] == "signing_keys_not_fetched"]
        assert [line["error"] for line in failed] == ["ProxyUrlError"]
        assert "Traceback" not in server.log.read_text()


@SQLITE
def test_the_server_fetches_keys_through_the_proxy(
    database_url: str, clerk: FakeClerk, make_proxy: MakeProxy, tmp_path: Path
) -> None:
    """A SOCKS proxy works inside a worker's event loop."""
    through = make_proxy(proxy.socks)
    variables = {"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": f"{API}/jwks", "WEB_CONCURRENCY": "1"}
    variables["ALL_PROXY"] = f"socks5://{through.address}"
    with serving(database_url, clerk, tmp_path / "server.log", **variables) as server:
        token = clerk.session_token(clerk_id("user"))
        answer = server.request("GET", "/api/me", headers={"Authorization": f"Bearer {token}"})
        assert answer.status == 200, server.log.read_text()
    assert through.targets == [f"SOCKS {HOST}:443"]
