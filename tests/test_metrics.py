"""``/metrics``: values, access, and totals across all workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from flask import Flask, Response, request
from flask_sqlalchemy import SQLAlchemy
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from clerkhooks import ClerkHooks
from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from clerkhooks.settings import PROJECT
from clerkhooks.web import metrics
from clerkhooks.web.metrics import FAMILIES
from clerkhooks.web.state import disconnect
from tests.conftest import MakeDatabase, MakeService, migrate
from tests.issuer import Issuer, answering, jwk, wait_for_fetches
from tests.racing import eventually
from tests.server import Server, environ, serving
from tests.support import NOW_MS, Service, broken_users, deletion, user_event

TOKEN = "a-token-of-sixteen-characters-or-more"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """Return the samples by name (without prefix) and label values (type before outcome)."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels[name] for name in sorted(sample.labels, reverse=True))
            found[(sample.name.removeprefix("clerkhooks_"), *labels)] = sample.value
    return found


def scrape(service: Service) -> Samples:
    """Return the samples that ``/metrics`` reports."""
    response = service.http.get("/metrics", headers=AUTHORIZED)
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    return samples(response.text)


@pytest.fixture
def counted(make_service: MakeService) -> Service:
    """Create the service with metrics enabled."""
    return make_service(METRICS_TOKEN=TOKEN)


def test_counts_deliveries_by_type_and_outcome(counted: Service) -> None:
    """
    Each outcome is counted with its duration.

    The delay is recorded for applied and stale events only.
    """
    user_id = clerk_id("user")
    with broken_users(counted):
        counted.deliver(user_event(clerk_id("user"), "user.created"))
    counted.outcome(user_event(user_id, at=NOW_MS - 3_600_000), "msg_1")
    counted.outcome(user_event(user_id, at=NOW_MS - 3_600_000), "msg_1")
    counted.outcome(user_event(user_id, at=1), "msg_2")
    counted.outcome(deletion(user_id))
    counted.outcome(event_body("session.created", {}, 1))
    found = scrape(counted)
    assert {key[1:]: value for key, value in found.items() if key[0] == "webhooks_total"} == {
        ("user.created", "failed"): 1,
        ("user.updated", "applied"): 1,
        ("user.updated", "duplicate"): 1,
        ("user.updated", "stale"): 1,
        ("user.deleted", "applied"): 1,
        ("session", "ignored"): 1,
    }
    assert found[("webhook_duration_seconds_count",)] == 6
    assert found[("webhook_lag_seconds_count",)] == 3
    assert (
        found[("webhook_lag_seconds_bucket", "1800.0")],
        found[("webhook_lag_seconds_bucket", "7200.0")],
    ) == (1, 2)


def test_counts_refusals_by_reason(counted: Service) -> None:
    """Refused deliveries and session tokens are counted; other client errors are not."""
    counted.http.post("/webhooks/clerk", data=b"{}")
    counted.deliver(b"[]")
    counted.http.get("/api/me")
    counted.http.get("/api/me", headers={"Authorization": "Bearer x"})
    counted.call(clerk_id("user"), "PUT", "/api/me/presence", body={})
    counted.http.get("/nowhere")
    found = scrape(counted)
    assert {
        key[1]: value for key, value in found.items() if key[0] == "webhook_refusals_total"
    } == {
        "signature_headers_missing": 1,
        "body_not_an_object": 1,
    }
    assert {
        key[1]: value for key, value in found.items() if key[0] == "sessions_refused_total"
    } == {
        "token_missing": 1,
        "token_malformed": 1,
    }
    assert found[("sessions_verified_total",)] == 1


def test_counts_users_without_a_profile(counted: Service) -> None:
    """
    Users created by a first call are counted, as are users who still have no profile.

    The age of the last webhook is reported once a webhook has arrived.
    """
    ids = [clerk_id("user") for _ in range(2)]
    assert ("last_webhook_age_seconds",) not in scrape(counted)
    for user_id in (*ids, *ids):
        counted.call(user_id)
    counted.outcome(user_event(ids[0]))
    found = scrape(counted)
    assert (
        found[("fallback_users_total",)],
        found[("users_unfilled",)],
        found[("database_up",)],
    ) == (2, 1, 1)
    assert 0 <= found[("last_webhook_age_seconds",)] < 60
    assert (found[("database_connections_in_use",)], found[("database_connections_limit",)]) == (
        0,
        10,
    )


def test_reports_an_unavailable_database(make_unreachable: MakeService) -> None:
    """All metrics that do not come from the database are still reported."""
    service = make_unreachable(METRICS_TOKEN=TOKEN)
    service.http.get("/api/me")
    found = scrape(service)
    assert (found[("database_up",)], found[("sessions_refused_total", "token_missing")]) == (0, 1)
    assert ("users_unfilled",) not in found


def test_counts_connections_right_after_an_outage(
    make_database: MakeDatabase, make_service: MakeService, clerk: FakeClerk
) -> None:
    """
    Failed attempts to connect do not change the number of connections in use.

    SQLAlchemy's pool emits a check-in event even for a connection that could not be opened.
    """
    url = make_database("postgresql")
    migrate(url, clerk)
    service = make_service(METRICS_TOKEN=TOKEN, DATABASE_URL=url)
    assert service.call(clerk_id("user")).status_code == 200
    name = url.partition("?")[0].rpartition("/")[2]
    with psycopg.connect(url.replace(f"/{name}", "/postgres"), autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
            [name],
        )
        away = [service.call(clerk_id("user")).status_code for _ in range(3)]
        found = scrape(service)
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    assert away == [500] * 3
    assert (found[("database_up",)], found[("database_connections_in_use",)]) == (0, 0)
    assert service.call(clerk_id("user")).status_code == 200
    found = scrape(service)
    assert (found[("database_up",)], found[("database_connections_in_use",)]) == (1, 0)


def test_reports_fetches_and_age_of_the_signing_keys(
    make_service: MakeService, clerk: FakeClerk
) -> None:
    """Successful and failed fetches are counted, and the age of the keys is reported."""
    with Issuer(jwk(clerk)).open() as issuer:
        service = make_service(METRICS_TOKEN=TOKEN, CLERK_JWT_KEY=None, CLERK_JWKS_URL=issuer.url)
        keys: Any = service.app.extensions["clerkhooks"].authenticator.verifier.keys
        assert ("signing_keys_age_seconds",) not in scrape(service)
        keys.cooldown = 0
        for behaviour in (issuer.behaviour, answering(b"", 500)):
            issuer.behaviour = behaviour
            keys.fetch_soon()
            wait_for_fetches()
        found = scrape(service)
    assert (
        found[("signing_keys_fetches_total", "ok")],
        found[("signing_keys_fetches_total", "failed")],
    ) == (1, 1)
    assert 0 <= found[("signing_keys_age_seconds",)] < 60


def test_ignores_a_late_answer_for_the_age_of_keys(
    make_service: MakeService, clerk: FakeClerk
) -> None:
    """A fetch that timed out does not change the keys, so their age does not change either."""
    with Issuer(jwk(clerk)).open() as issuer:
        service = make_service(METRICS_TOKEN=TOKEN, CLERK_JWT_KEY=None, CLERK_JWKS_URL=issuer.url)
        keys: Any = service.app.extensions["clerkhooks"].authenticator.verifier.keys
        # The result is discarded, because this thread is not the latest fetch thread.
        keys._fetch_now()
    found = scrape(service)
    assert keys.age is None
    assert ("signing_keys_age_seconds",) not in found
    assert found[("signing_keys_fetches_total", "failed")] == 1


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff\xfe", TOKEN],
)
def test_is_hidden_without_the_right_token(counted: Service, header: str | None) -> None:
    """Without the token, the response is the same as for an unknown path."""
    headers = {} if header is None else {"Authorization": header}
    answer, nowhere = (
        counted.http.get("/metrics", headers=headers),
        counted.http.get("/nowhere", headers=headers),
    )
    assert (answer.status_code, answer.data) == (404, nowhere.data)


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE", "TRACE", "ANY"])
def test_refuses_other_methods(counted: Service, service: Service, method: str) -> None:
    """
    Any method except GET and HEAD gets a 405 if the caller sends the token.

    Without the token, or if METRICS_TOKEN is not set, every method gets a 404.
    """
    answer = counted.http.open("/metrics", method=method, headers=AUTHORIZED)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
    for http in (counted.http, service.http):
        assert (
            http.open("/metrics", method=method).status_code,
            http.open("/metrics", method=method).headers.get("Allow"),
        ) == (404, None)


def test_is_disabled_without_a_configured_token(service: Service) -> None:
    """Without METRICS_TOKEN, the route returns 404, whatever token is sent."""
    for token in ("", "None", TOKEN):
        assert (
            service.http.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code
            == 404
        )


@pytest.mark.slow
def test_loads_no_library_when_disabled(clerk: FakeClerk, tmp_path: Path) -> None:
    """Without METRICS_TOKEN, prometheus-client is not imported."""
    code = "import sys, wsgi; sys.exit('prometheus_client' in sys.modules)"
    variables = environ(**clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"})
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=variables, timeout=30
        ).returncode
        == 0
    )


def test_limits_the_number_of_series(counted: Service) -> None:
    """Types, ids and tokens chosen by a sender do not create new series."""
    for number in range(40):
        counted.deliver(event_body(f"type{number}.created", {}, 1))
        counted.deliver(event_body(f"user.{number}", {}, 1))
        counted.http.post(
            "/webhooks/clerk",
            data=b"{}",
            headers={"svix-id": f"msg_{number}", "svix-signature": str(number)},
        )
        counted.http.get("/api/me", headers={"Authorization": f"Bearer {number}"})
        counted.http.get(f"/{number}")
    labels = {key[1:] for key in scrape(counted) if key[0].endswith("_total") and len(key) > 1}
    assert labels == {
        ("other", "ignored"),
        ("user", "ignored"),
        ("signature_headers_missing",),
        ("token_malformed",),
    }
    assert "user" in FAMILIES


def test_ignores_deliveries_that_the_application_refuses(counted: Service) -> None:
    """A delivery that the application refuses before it reaches the endpoint is not counted."""
    counted.app.before_request(
        lambda: Response(status=403) if request.path == "/webhooks/clerk" else None
    )
    assert counted.http.post("/webhooks/clerk", data=b"{}").status_code == 403
    found = scrape(counted)
    counts = {
        key: value
        for key, value in found.items()
        if key[0].startswith("webhook") and not key[0].endswith("_created")
    }
    assert set(counts.values()) == {0}


def test_moves_with_its_prefix(clerk: FakeClerk, tmp_path: Path) -> None:
    """With ``url_prefix``, the metrics move under the prefix and stay protected."""
    app, own_db = Flask("guest"), SQLAlchemy()
    url = f"sqlite:///{tmp_path}/x.db"
    app.config.update(clerk.environ, SQLALCHEMY_DATABASE_URI=url, METRICS_TOKEN=TOKEN)
    own_db.init_app(app)
    ClerkHooks(own_db).init_app(app, routes=("webhooks", "metrics"), url_prefix="/internal")
    http = app.test_client()
    assert http.get("/internal/metrics", headers=AUTHORIZED).status_code == 200
    assert http.open("/internal/metrics", method="ANY").status_code == 404
    assert http.get("/metrics", headers=AUTHORIZED).status_code == 404
    assert http.post("/internal/webhooks/clerk", data=b"{}").status_code == 401
    counted = samples(http.get("/internal/metrics", headers=AUTHORIZED).text)
    assert counted[("webhook_refusals_total", "signature_headers_missing")] == 1
    disconnect(app)


def test_counts_each_application_separately(make_service: MakeService) -> None:
    """Two applications in one process share no metrics."""
    first, second = make_service(METRICS_TOKEN=TOKEN), make_service(METRICS_TOKEN=TOKEN)
    first.outcome(user_event(clerk_id("user")))
    assert scrape(first)[("webhooks_total", "user.updated", "applied")] == 1
    assert ("webhooks_total", "user.updated", "applied") not in scrape(second)


def deliver_and_call(server: Server, count: int) -> None:
    """Send *count* webhooks and API calls on separate connections, so both workers take part."""
    for _ in range(count):
        user_id = clerk_id("user")
        assert server.deliver(user_event(user_id)).status == 200
        headers = {"Authorization": f"Bearer {server.clerk.session_token(user_id)}"}
        assert server.request("GET", "/api/me", headers=headers).status == 200


def workers(server: Server) -> list[int]:
    """Return the process ids of the server's workers."""
    return [
        int(pid)
        for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        .read_text()
        .split()
    ]


def scrape_once_both_serve(server: Server) -> Samples:
    """Return the samples once two workers have reported the size of their pools."""

    def read() -> Samples:
        return samples(server.request("GET", "/metrics", headers=AUTHORIZED).body.decode())

    eventually(lambda: read()[("database_connections_limit",)] == 20)
    return read()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_adds_up_all_workers(database_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """
    The counters of two workers are added up, even after one of them was killed.

    A killed worker's gauges disappear. When the server stops, it removes all metrics files.
    """
    folder = tmp_path / "tmp"
    folder.mkdir()
    variables = {
        "METRICS_TOKEN": TOKEN,
        "TMPDIR": str(folder),
        "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
    }
    with serving(database_url, clerk, tmp_path / "server.log", **variables) as server:
        deliver_and_call(server, 8)
        first = scrape_once_both_serve(server)
        before = workers(server)
        victim = before[0]
        [directory] = folder.glob("clerkhooks-metrics-*")
        os.kill(victim, signal.SIGKILL)

        def is_replaced() -> bool:
            is_serving = len(workers(server)) == 2 and victim not in workers(server)
            return is_serving and not list(directory.glob(f"gauge_live*_{victim}.db"))

        eventually(is_replaced)
        deliver_and_call(server, 4)
        second = scrape_once_both_serve(server)
        assert TOKEN not in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    for found, count in ((first, 8), (second, 12)):
        assert found[("webhooks_total", "user.updated", "applied")] == count
        assert found[("webhook_duration_seconds_count",)] == count
        assert found[("sessions_verified_total",)] == count
        assert 0 <= found[("database_connections_in_use",)] <= 1
    assert not list(folder.glob("clerkhooks-metrics-*"))


def test_waits_for_a_file_being_created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reader waits for a file that another worker has created but not yet written to."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    file = tmp_path / "counter_1.db"
    file.touch()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        MmapedDict(str(file)).close()  # type: ignore[no-untyped-call]

    monkeypatch.setattr(metrics, "time", SimpleNamespace(sleep=sleep))
    assert metrics._read_files() == []
    assert len(waits) == 1


BOOTS = """
import atexit, os, runpy
from pathlib import Path

removals = []
atexit.register = lambda *call: removals.append(call)
directories = []
for _ in range(2):
    runpy.run_path("gunicorn.conf.py", run_name="configuration")
    directories.append(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
removals = [call for call in removals if call[0].__name__ == "_remove_metrics"]
assert len({Path("/nowhere"), *directories}) == 3
assert not any(path for directory in directories for path in directory.iterdir())
for remove, directory, owner in removals:
    remove(directory, owner + 1)
assert all(directory.is_dir() for directory in directories)
for remove, directory, owner in removals:
    remove(directory, owner)
assert not any(directory.exists() for directory in directories)
print(len(removals))
"""


def test_starts_from_zero_at_each_boot(clerk: FakeClerk, tmp_path: Path) -> None:
    """
    Each server start uses a new, empty directory, which only the master process removes.

    If PROMETHEUS_MULTIPROC_DIR already names a directory, that directory is not used.
    """
    own = {"METRICS_TOKEN": TOKEN, "PROMETHEUS_MULTIPROC_DIR": "/nowhere", "TMPDIR": str(tmp_path)}
    variables = environ(**clerk.environ, **own, DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    # This runs in a separate process: the configuration monkey-patches the standard library.
    ended = subprocess.run(
        [sys.executable, "-c", BOOTS],
        cwd=PROJECT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "2\n", "")
