"""``clerkhooks doctor`` reports each mistake, and reports no problems in a correct setup."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

from clerkhooks import doctor
from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.cli.main import main
from clerkhooks.doctor import APPLICATION, OUTSIDE_CHECKS, configuration, findings
from clerkhooks.doctor.database import judge_database, plain_store
from clerkhooks.settings import VARIABLES, ServiceSettings, merge_config
from clerkhooks.store.database import Database
from tests.backend import Backend, answering, refusing, stalling
from tests.conftest import MakeDatabase, MakeService, migrate
from tests.following import complete_round
from tests.issuer import Issuer, jwk, key_set
from tests.server import environ
from tests.support import Service, broken_users, rows, user_event


@pytest.fixture(autouse=True)
def soon_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between requests to the Backend API, but not a request's timeout."""
    monkeypatch.setattr(doctor.instance, "BackendApi", partial(BackendApi, pace=0.02))


@pytest.fixture
def instance(clerk: FakeClerk) -> Iterator[Issuer]:
    """Run an endpoint that publishes the instance's keys."""
    with Issuer(jwk(clerk)).open() as issuer:
        yield issuer


@pytest.fixture
def correct(
    clerk: FakeClerk, database_url: str, instance: Issuer, backend: Backend
) -> dict[str, str]:
    """Return correct settings that refer to servers on this machine."""
    backend.secret_key = backend.secret_key.replace("live", "test")
    backend.jwks = key_set(jwk(clerk))
    return clerk.environ | {
        "DATABASE_URL": database_url,
        "CLERK_API_URL": backend.api_url,
        "CLERK_JWKS_URL": instance.url,
        "CLERK_SECRET_KEY": backend.secret_key,
    }


SECRET_NAMES = (
    "CLERK_WEBHOOK_SECRET",
    "CLERK_SECRET_KEY",
    "CLERK_JWT_KEY",
    "METRICS_TOKEN",
    "CONSOLE_PASSWORD",
)


def find(
    values: Mapping[str, str], project: Path = Path("/nowhere"), **options: Any
) -> dict[str, doctor.Finding]:
    """Return the findings by code; check that they have remedies and contain no secrets."""
    found = list(doctor.diagnose(values, project=project, **options))
    texts = repr(found)
    for name in SECRET_NAMES:
        assert len(values.get(name, "")) < 8 or values[name][8:] not in texts
    assert all(finding.remedy for finding in found if finding.level in ("warning", "error"))
    return {finding.code: finding for finding in found}


def levels(values: Mapping[str, str], **options: Any) -> dict[str, str]:
    """Return the level of each finding by code."""
    return {code: finding.level for code, finding in find(values, **options).items()}


KEYS_OK = (
    "jwt_keys_configured",
    "jwt_keys_match",
    "clock_right",
    "secret_key_accepted",
    "keys_of_one_instance",
)
SETTINGS_OK = ("settings_valid", "webhook_secret_set", "authorized_parties_set")
TABLES_OK = ("database_ready", "messages_processed", "webhook_received", "users_filled")
FOLLOWER_OK = ("follower_runs", "deliveries_complete")


def test_reports_ok_for_every_check(correct: dict[str, str], make_service: MakeService) -> None:
    """In a correct setup, every finding is OK, and no check is skipped."""
    service = make_service(**correct)
    service.outcome(user_event(clerk_id("user")))
    complete_round(service)
    expected = (*KEYS_OK, *SETTINGS_OK, "env_file_absent", *TABLES_OK, *FOLLOWER_OK)
    assert levels(correct) == dict.fromkeys(expected, "ok")


SECRET = "whsec_" + "B" * 32
LIVE = "pk_live_Y2xlcmsuZXhhbXBsZS5jb20k"
CLOSED = "http://127.0.0.1:1"
NO_KEYS = {
    "CLERK_JWT_KEY": "",
    "CLERK_JWKS_URL": "",
    "CLERK_PUBLISHABLE_KEY": "",
    "CLERK_SECRET_KEY": "",
}
LIVE_ON_LOCALHOST = {
    "CLERK_PUBLISHABLE_KEY": LIVE,
    "CLERK_AUTHORIZED_PARTIES": "http://localhost:3000",
}
ONLY_FRONT_END = {"NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": LIVE, "CLERK_PUBLISHABLE_KEY": ""}
UNREACHABLE = {"DATABASE_URL": "postgresql://nobody:hidden@127.0.0.1:1/none"}
UNESCAPED = {"DATABASE_URL": "postgresql://nobody:hid@den@127.0.0.1:1/none"}
ROTATION = {"CLERK_WEBHOOK_SECRET": f"{SECRET},{SECRET[:-1]}A"}
MOVING = {"CLERK_ISSUER": "https://clerk.example.com,https://clerk.example.org"}
MISTAKES: list[tuple[dict[str, str], str, str]] = [
    ({"CLERK_WEBHOOK_SECRET": ""}, "variable_wrong", "error"),
    ({"CLERK_WEBHOOK_SECRET": "whsec_hidden!"}, "variable_wrong", "error"),
    ({"PORT": "x", "WEB_CONCURRENCY": "y"}, "variable_wrong", "error"),
    ({"METRICS_TOKEN": "short"}, "variable_wrong", "error"),
    ({"CONSOLE_PASSWORD": "fifteen-letters"}, "variable_wrong", "error"),
    ({"LOG_FORMAT": "xml"}, "variable_wrong", "error"),
    ({"CLERK_WEBHOOK_SECRETS": SECRET}, "variable_unknown", "warning"),
    ({"CLERK_XYZZY": SECRET}, "variable_unknown", "warning"),
    (ONLY_FRONT_END, "publishable_key_misplaced", "warning"),
    ({"VITE_CLERK_PUBLISHABLE_KEY": LIVE}, "publishable_keys_differ", "warning"),
    ({"CLERK_WEBHOOK_SIGNING_SECRET": SECRET}, "webhook_secret_unread", "warning"),
    ({"CLERK_WEBHOOK_SECRET": f"{SECRET},{SECRET}"}, "webhook_secret_repeated", "warning"),
    (ROTATION, "webhook_secret_rotation", "warning"),
    ({"CLERK_PUBLISHABLE_KEY": LIVE}, "keys_of_two_instances", "error"),
    (LIVE_ON_LOCALHOST, "authorized_parties_local", "warning"),
    ({"CLERK_AUTHORIZED_PARTIES": "native"}, "authorized_parties_set", "ok"),
    ({"CLERK_ISSUER": "https://clerk.other.example"}, "issuer_differs", "warning"),
    (MOVING, "issuers_several", "warning"),
    ({"CLERK_AUTHORIZED_PARTIES": ""}, "authorized_parties_unset", "warning"),
    ({"CLERK_SECRET_KEY": ""}, "secret_key_unset", "skipped"),
    ({"CLERK_SECRET_KEY": "sk_test_another"}, "secret_key_refused", "error"),
    ({"CLERK_API_URL": CLOSED}, "secret_key_not_tried", "skipped"),
    ({"CLERK_API_URL": CLOSED}, "clock_not_compared", "skipped"),
    ({"CLERK_JWT_KEY": FakeClerk().public_key_pem}, "jwt_key_of_another_instance", "error"),
    ({"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": CLOSED}, "keys_not_fetched", "error"),
    ({"CLERK_JWT_KEY": ""}, "keys_fetched", "ok"),
    ({"CLERK_JWKS_URL": CLOSED}, "jwt_keys_not_compared", "skipped"),
    (NO_KEYS, "keys_not_configured", "warning"),
    (NO_KEYS | {"CLERK_JWT_KEY": "x"}, "keys_skipped", "skipped"),
    (UNREACHABLE, "database_unreachable", "error"),
    (UNESCAPED, "database_unreachable", "error"),
    ({"DATABASE_URL": "mysql://hidden"}, "database_skipped", "skipped"),
    ({"DYNO": "web.1"}, "sqlite_on_platform", "error"),
]


@pytest.mark.parametrize(("changes", "code", "level"), MISTAKES)
def test_finds_each_mistake(
    clerk: FakeClerk,
    instance: Issuer,
    backend: Backend,
    tmp_path: Path,
    changes: dict[str, str],
    code: str,
    level: str,
) -> None:
    """Each mistake has its own code. Its finding hides no other finding and reveals no secret."""
    backend.secret_key = "sk_test_ofThisInstance"
    values = clerk.environ | {
        "DATABASE_URL": f"sqlite:///{tmp_path}/none.db",
        "CLERK_JWKS_URL": instance.url,
        "CLERK_API_URL": backend.api_url,
        "CLERK_SECRET_KEY": backend.secret_key,
    }
    found = find(values | changes)
    assert found[code].level == level
    assert "hidden" not in repr(found)
    about_database = {"database_not_migrated", "database_unreachable", "database_skipped"}
    assert about_database & found.keys(), "the mistake hides the findings about the database"
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_reports_a_retired_api_version(
    correct: dict[str, str], backend: Backend, status: int
) -> None:
    """Clerk refuses the version of the Backend API, but answers if no version is requested."""
    backend.retired = refusing(status, "hidden")
    found = find(correct)
    assert found["api_version_retired"].level == "error"
    assert "2026-05-12" in found["api_version_retired"].what
    assert "hidden" not in repr(found)
    assert {"secret_key_accepted", "secret_key_refused"}.isdisjoint(found)


def test_does_not_blame_the_version_for_another_refusal(
    correct: dict[str, str], backend: Backend
) -> None:
    """If the request is also refused without a version, the version is not the cause."""
    backend.always = refusing(422, "hidden")
    found = find(correct)
    assert found["secret_key_refused"].level == "error"
    assert "api_version_retired" not in found


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "clock_right"), (60, "clock_off"), (-400, "clock_wrong")]
)
def test_compares_the_clock(
    clerk: FakeClerk, backend: Backend, seconds: int, expected: str
) -> None:
    """The clock is compared with the Date header of Clerk's response."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)

    def answer(_backend: Any, request: Any) -> None:
        request.date_time_string = lambda *_: date
        answering(200, b"{}")(backend, request)

    backend.always = answer
    values = {
        "CLERK_API_URL": backend.api_url,
        "CLERK_JWKS_URL": CLOSED,
        "DATABASE_URL": "mysql://",
    }
    assert expected in levels(clerk.environ | values)


OWN_KEY = jwk(FakeClerk())
PUBLISHED = [
    ([OWN_KEY], "keys_of_one_instance", "ok"),
    ([OWN_KEY | {"kid": "ins_other"}, OWN_KEY], "keys_of_one_instance", "ok"),
    ([OWN_KEY | {"kid": "ins_other"}], "keys_of_two_instances", "error"),
    ([], "instances_not_compared", "skipped"),
]


@pytest.mark.parametrize(("keys", "code", "level"), PUBLISHED)
def test_compares_the_instances_of_both_keys(
    correct: dict[str, str], backend: Backend, keys: list[Any], code: str, level: str
) -> None:
    """Both keys belong to one instance if the two APIs publish the same signing key."""
    backend.jwks = key_set(*keys)
    found = find(correct)
    codes = {"keys_of_one_instance", "keys_of_two_instances", "instances_not_compared"}
    assert {name: found[name].level for name in codes & found.keys()} == {code: level}


@pytest.mark.parametrize("left_out", ["CLERK_JWT_KEY", "METRICS_TOKEN"])
def test_fetches_each_key_set_once(
    correct: dict[str, str], instance: Issuer, backend: Backend, left_out: str
) -> None:
    """Several checks need a key set, but it is fetched only once."""
    find({name: value for name, value in correct.items() if name != left_out})
    assert len(instance.requests) == 1
    assert [path for path, _ in backend.requests].count("/v1/jwks") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"CLERK_JWKS_URL": CLOSED}, "ConnectError"),
        ({"CLERK_API_URL": CLOSED}, "ConnectError"),
        ({"CLERK_SECRET_KEY": "sk_test_another"}, "no key set"),
    ],
)
def test_says_why_instances_are_not_compared(
    correct: dict[str, str], changes: dict[str, str], reason: str
) -> None:
    """If a key set cannot be fetched, the finding names the host and the reason."""
    found = find(correct | changes)["instances_not_compared"]
    assert found.level == "skipped"
    assert found.what == f"Not compared: no key could be fetched from 127.0.0.1 ({reason})."


@pytest.mark.parametrize(
    "changes",
    [
        {"CLERK_SECRET_KEY": ""},
        {"CLERK_PUBLISHABLE_KEY": ""},
        {"CLERK_PUBLISHABLE_KEY": LIVE},
        {"CLERK_SECRET_KEY": "sk_test_not valid"},
        {"CLERK_API_URL": "http://api.example.com"},
    ],
)
def test_compares_no_instances_without_both_keys(
    correct: dict[str, str], backend: Backend, changes: dict[str, str]
) -> None:
    """The instances are not compared if an API key or the API's URL is missing or invalid."""
    find(correct | changes)
    assert "/v1/jwks" not in [path for path, _ in backend.requests]


def test_reports_what_the_tables_hold(correct: dict[str, str], make_service: MakeService) -> None:
    """
    Failed messages and users without a profile are reported as errors.

    A lack of webhooks is reported as a warning.
    """
    service = make_service(**correct)
    assert levels(correct)["webhook_never_received"] == "warning"
    with broken_users(service):
        service.deliver(user_event(clerk_id("user")))
    user_id = clerk_id("user")
    service.call(user_id)
    found = levels(correct)
    expected = {"messages_failed": "error", "users_filled": "ok", "webhook_received": "ok"}
    assert found.items() >= expected.items()
    service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00.000000'")
    service.rows("UPDATE webhook_messages SET received_at = '2020-01-01 00:00:00.000000'")
    found = levels(correct)
    expected = {"messages_processed": "ok", "users_unfilled": "error", "webhooks_silent": "warning"}
    assert found.items() >= expected.items()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_compares_the_schema_with_the_code(
    make_database: MakeDatabase, clerk: FakeClerk, kind: str
) -> None:
    """Every table and column that the code needs must exist. Additional ones are accepted."""
    url = make_database(kind)
    values = clerk.environ | {
        "DATABASE_URL": url,
        "CLERK_API_URL": CLOSED,
        "CLERK_JWKS_URL": CLOSED,
    }

    def judge() -> tuple[str, str]:
        found = next(item for item in find(values).values() if item.subject == "database")
        return found.code, found.what

    rows(url, "CREATE TABLE notes (id INTEGER)")
    code, what = judge()
    assert code == "database_not_migrated"
    assert what.endswith("responds, but is not migrated.")
    migrate(url, clerk)
    assert judge()[0] == "database_ready"
    rows(url, "ALTER TABLE users ADD COLUMN of_a_later_release TEXT")
    rows(url, "UPDATE clerkhooks_version SET version_num = 'later'")
    assert judge()[0] == "database_ready"
    rows(url, "ALTER TABLE webhook_messages DROP COLUMN error")
    code, what = judge()
    assert code == "database_not_migrated"
    assert what.endswith("responds, but lacks tables or columns that this release needs.")
    rows(url, "DROP TABLE users")
    rows(url, "CREATE TABLE users (id INTEGER)")
    assert judge()[0] == "database_of_others"


def test_reports_a_read_only_database(
    correct: dict[str, str], make_database: MakeDatabase, clerk: FakeClerk
) -> None:
    """A read-only database, such as a standby, is reported as an error."""
    url = make_database("postgresql")
    migrate(url, clerk)
    rows(url, f"ALTER DATABASE {make_url(url).database} SET default_transaction_read_only TO on")
    assert levels(correct | {"DATABASE_URL": url})["database_read_only"] == "error"


def test_gives_up_on_a_database_that_does_not_answer(
    correct: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check ends even if the database does not respond."""
    may_end = threading.Event()
    monkeypatch.setattr(Database, "connect", lambda _database: may_end.wait(20))
    monkeypatch.setattr(doctor.database, "DATABASE_TIMEOUT", 0.1)
    found = find(correct)
    may_end.set()
    assert found["database_unreachable"].what.endswith("does not respond (TimeoutError).")


def test_names_the_commands_of_the_service(
    correct: dict[str, str], make_service: MakeService, make_database: MakeDatabase
) -> None:
    """Remedies for the service contain commands that can be pasted into a shell."""
    service = make_service(**correct)
    assert "clerkhooks send user.created" in str(find(correct)["webhook_never_received"].remedy)
    with broken_users(service):
        service.deliver(user_event(clerk_id("user")))
    service.call(clerk_id("user"))
    failed = str(find(correct)["messages_failed"].remedy)
    assert "clerkhooks log --failed" in failed
    assert "clerkhooks sync --failed" in failed
    service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00.000000'")
    assert "clerkhooks sync --missing" in str(find(correct)["users_unfilled"].remedy)
    found = find(correct | {"DATABASE_URL": make_database("postgresql")})
    assert str(found["database_not_migrated"].remedy) == "Migrate: flask --app wsgi db upgrade"


def test_examines_an_application_by_its_own_settings(
    clerk: FakeClerk, backend: Backend, instance: Issuer, tmp_path: Path
) -> None:
    """In an application, the doctor does not check the database, logs, server or files."""
    (tmp_path / ".env").write_text("PORT=8000")
    config: dict[str, Any] = clerk.environ | {
        "CLERK_API_URL": backend.api_url,
        "CLERK_JWKS_URL": instance.url,
    }
    config |= {"CLERK_SECRET_KEY": backend.secret_key, "METRICS_TOKEN": None}
    service_only = {"DATABASE_URL": "mysql://", "LOG_FORMAT": "xml", "PORT": "x", "DYNO": "web.1"}
    values: Any = merge_config(
        config, service_only | {"CLERK_AUDIENCE": ",", "WEB_CONCURRENCY": "x"}
    )
    options: dict[str, Any] = {"checks": OUTSIDE_CHECKS, "program": APPLICATION}
    found = list(doctor.diagnose(values, project=tmp_path, **options))
    codes = [finding.code for finding in found if finding.level != "ok"]
    assert codes == ["variable_wrong", "keys_of_two_instances"]
    assert found[0].subject == "CLERK_AUDIENCE"


def test_names_the_commands_of_an_application(
    make_database: MakeDatabase, make_service: MakeService
) -> None:
    """Remedies for an application contain ``flask`` commands."""
    url = make_url(make_database("postgresql")).set(drivername="postgresql+psycopg")
    store = plain_store(url)
    service = make_service()
    state = service.app.extensions["clerkhooks"]
    [found] = judge_database(store, state.settings, APPLICATION)
    store.database.engine.dispose()
    assert found.remedy == "Migrate: flask db migrate && flask db upgrade"
    with broken_users(service):
        service.deliver(user_event(clerk_id("user")))
    found_now = judge_database(state.store, state.settings, APPLICATION)
    remedies = [finding.remedy for finding in found_now]
    assert any("flask clerk sync --failed" in str(remedy) for remedy in remedies)


def test_finds_an_exposed_env_file(tmp_path: Path) -> None:
    """A .env file is exposed if other users of the machine can read it."""

    def codes() -> list[str]:
        case = doctor.Case({}, ServiceSettings(webhook_secrets=()), (), tmp_path)
        return [finding.code for finding in configuration.check_env_file(case)]

    file = tmp_path / ".env"
    assert codes() == ["env_file_absent"]
    file.touch(mode=0o600)
    assert codes() == ["env_file_private"]
    for mode in (0o604, 0o640):
        file.chmod(mode)
        assert codes() == ["env_file_readable"]


def test_continues_after_a_check_that_fails() -> None:
    """If a check raises an exception, a finding names the check and omits the error's text."""

    def check_broken(_case: doctor.Case) -> Iterator[doctor.Finding]:
        raise RuntimeError("hidden")

    found = find({}, checks=(check_broken, configuration.check_settings))
    assert list(found) == ["check_broken", "variable_wrong"]
    assert "hidden" not in repr(found)


def test_gives_up_on_a_clerk_that_does_not_answer(
    clerk: FakeClerk, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Clerk accepts a request and never responds, the checks that need Clerk are skipped."""
    monkeypatch.setattr(findings, "TIMEOUT", 0.2)
    backend.always = stalling
    values = clerk.environ | {
        "CLERK_API_URL": backend.api_url,
        "CLERK_SECRET_KEY": backend.secret_key,
        "CLERK_JWKS_URL": f"{backend.api_url}/keys",
        "DATABASE_URL": "mysql://",
        "CLERK_PUBLISHABLE_KEY": "",
    }
    found = levels(values)
    expected = ("clock_not_compared", "secret_key_not_tried", "jwt_keys_not_compared")
    assert {code: found[code] for code in expected} == dict.fromkeys(expected, "skipped")


def run(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, str], *arguments: str) -> Result:
    """Run the command with *values* as the only settings in the environment."""
    for name in VARIABLES:
        monkeypatch.setenv(name, values.get(name, ""))
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_prints_findings_and_remedies(
    monkeypatch: pytest.MonkeyPatch, correct: dict[str, str], service: Service
) -> None:
    """
    The text output has ticks and crosses, and the JSON output has codes.

    An error sets the exit status to 1.
    """
    complete_round(service)
    text = run(monkeypatch, correct)
    assert text.exit_code == 0
    line = (
        "  ✓ clock                    This machine's clock agrees with Clerk's to within 5 seconds."
    )
    assert line in text.output
    assert "\n✓ 0 errors, 1 warning, 0 skipped.\n" in text.output
    broken = correct | {"PORT": "x", "CLERK_AUTHORIZED_PARTIES": ""}
    text = run(monkeypatch, broken)
    assert text.exit_code == 1
    line = "  ✗ PORT                     PORT must be a number from 1 to 65535.\n"
    assert f"{line}      A free TCP port, such as 8000.\n" in text.output
    assert "\n✗ 1 error, 2 warnings, 0 skipped.\n" in text.output
    as_json = run(monkeypatch, broken, "--json")
    first = json.loads(as_json.output)[0]
    assert (as_json.exit_code, first["code"], first["level"]) == (1, "variable_wrong", "error")
    assert first.keys() == {"level", "code", "subject", "what", "remedy"}


def test_works_where_the_service_refuses_to_start(tmp_path: Path) -> None:
    """The doctor works with invalid variables, in any directory, without a traceback."""
    values = environ(
        CLERK_API_URL=CLOSED,
        CLERK_WEBHOOK_SECRET="sk_test_hidden",
        DATABASE_URL="\x1b[31mmysql://hidden",
    )
    command = [sys.executable, "-m", "clerkhooks", "doctor"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "CLERK_WEBHOOK_SECRET is an API key" in ended.stdout
    assert "DATABASE_URL is not a database URL." in ended.stdout
    assert "hidden" not in ended.stdout


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PORT=\xff\xfe", ".env is not UTF-8 text."),
        (b'AUDIENCE="x\0y"', ".env cannot be read."),
    ],
)
def test_reports_an_unreadable_env_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    correct: dict[str, str],
    content: bytes,
    problem: str,
) -> None:
    """An unreadable .env file is reported, and the other checks still run."""
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.setattr("clerkhooks.cli.doctor.PROJECT", tmp_path)
    result = run(monkeypatch, correct, "--json")
    found = json.loads(result.output)
    assert result.exit_code == 1
    assert (found[0]["code"], found[0]["what"]) == ("variable_wrong", problem)
    assert len(found) > 5
