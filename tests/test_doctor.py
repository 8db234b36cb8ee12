"""``clerkhooks doctor``: each mistake is found, and none where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clerkhooks import diagnosis
from clerkhooks.cli import main
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.diagnosis import configuration, findings
from clerkhooks.settings import VARIABLES
from tests.backend import Backend, answering, stalling
from tests.conftest import MakeService
from tests.issuer import Issuer, jwk
from tests.server import environ
from tests.support import Service, broken_users, user_event


@pytest.fixture
def instance(clerk: PretendedClerk) -> Iterator[Issuer]:
    """Where the keys are published."""
    with Issuer(jwk(clerk)).open() as issuer:
        yield issuer


@pytest.fixture
def well(clerk: PretendedClerk, database_url: str, instance: Issuer, backend: Backend) -> dict[str, str]:
    """Variables with which nothing is wrong; nothing beyond this machine is asked."""
    secret_key = {"CLERK_SECRET_KEY": backend.secret_key.replace("live", "test")}
    backend.secret_key = secret_key["CLERK_SECRET_KEY"]
    return clerk.environ | {"DATABASE_URL": database_url, "CLERK_API_URL": backend.api_url, "CLERK_JWKS_URL": instance.url} | secret_key


def find(variables: dict[str, str], project: Path = Path("/nowhere"), **options: Any) -> dict[str, diagnosis.Finding]:
    """The findings by their codes; no secret is in any of them, and each that is not well has a remedy."""
    findings = list(diagnosis.diagnose(variables, project=project, **options))
    said = repr(findings)
    for name in ("CLERK_WEBHOOK_SECRET", "CLERK_SECRET_KEY", "CLERK_JWT_KEY", "METRICS_TOKEN", "CONSOLE_PASSWORD"):
        assert len(variables.get(name, "")) < 8 or variables[name][8:] not in said
    assert all(finding.remedy for finding in findings if finding.level in ("warning", "wrong"))
    return {finding.code: finding for finding in findings}


def levels(variables: dict[str, str]) -> dict[str, str]:
    """The level of each code."""
    return {code: finding.level for code, finding in find(variables).items()}


def test_finds_nothing_wrong_where_all_is_well(well: dict[str, str], make_service: MakeService) -> None:
    """Each check says so."""
    make_service(**well).outcome(user_event(clerk_id("user")))
    about_keys = ("jwt_keys_configured", "jwt_keys_match", "clock_right", "secret_key_accepted")
    about_settings = ("settings_valid", "env_file_absent", "webhook_secret_set", "authorized_parties_set")
    about_tables = ("database_ready", "messages_well", "webhook_received", "users_filled")
    assert levels(well) == dict.fromkeys((*about_keys, *about_settings, *about_tables), "ok")


SECRET = "whsec_" + "B" * 32
LIVE = "pk_live_Y2xlcmsuZXhhbXBsZS5jb20k"
LOST = "http://127.0.0.1:1"
MISTAKES: list[tuple[dict[str, str], str, str]] = [
    ({"CLERK_WEBHOOK_SECRET": ""}, "variable_wrong", "wrong"),
    ({"CLERK_WEBHOOK_SECRET": "whsec_hidden!"}, "variable_wrong", "wrong"),
    ({"PORT": "x", "WEB_CONCURRENCY": "y"}, "variable_wrong", "wrong"),
    ({"METRICS_TOKEN": "short"}, "variable_wrong", "wrong"),
    ({"CONSOLE_PASSWORD": "elevenchars"}, "variable_wrong", "wrong"),
    ({"LOG_FORMAT": "xml"}, "variable_wrong", "wrong"),
    ({"CLERK_WEBHOOK_SECRETS": SECRET}, "variable_unknown", "warning"),
    ({"CLERK_XYZZY": SECRET}, "variable_unknown", "warning"),
    ({"NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": LIVE, "CLERK_PUBLISHABLE_KEY": ""}, "publishable_key_misplaced", "warning"),
    ({"VITE_CLERK_PUBLISHABLE_KEY": LIVE}, "publishable_keys_differ", "warning"),
    ({"CLERK_WEBHOOK_SIGNING_SECRET": SECRET}, "webhook_secret_unread", "warning"),
    ({"CLERK_WEBHOOK_SECRET": f"{SECRET},{SECRET}"}, "webhook_secret_repeated", "warning"),
    ({"CLERK_WEBHOOK_SECRET": f"{SECRET},{SECRET[:-1]}A"}, "webhook_secret_rotation", "warning"),
    ({"CLERK_PUBLISHABLE_KEY": LIVE}, "keys_of_two_instances", "wrong"),
    ({"CLERK_PUBLISHABLE_KEY": LIVE, "CLERK_AUTHORIZED_PARTIES": "http://localhost:3000"}, "authorized_parties_local", "warning"),
    ({"CLERK_ISSUER": "https://clerk.other.example"}, "issuer_differs", "warning"),
    ({"CLERK_AUTHORIZED_PARTIES": ""}, "authorized_parties_unset", "warning"),
    ({"CLERK_SECRET_KEY": ""}, "secret_key_unset", "skipped"),
    ({"CLERK_SECRET_KEY": "sk_test_another"}, "secret_key_refused", "wrong"),
    ({"CLERK_API_URL": LOST}, "secret_key_not_tried", "skipped"),
    ({"CLERK_API_URL": LOST}, "clock_not_compared", "skipped"),
    ({"CLERK_JWT_KEY": PretendedClerk().public_key_pem}, "jwt_key_of_another_instance", "wrong"),
    ({"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": LOST}, "keys_not_fetched", "wrong"),
    ({"CLERK_JWT_KEY": ""}, "keys_fetched", "ok"),
    ({"CLERK_JWKS_URL": LOST}, "jwt_keys_not_compared", "skipped"),
    ({"CLERK_JWT_KEY": "", "CLERK_JWKS_URL": "", "CLERK_PUBLISHABLE_KEY": "", "CLERK_SECRET_KEY": ""}, "keys_not_configured", "warning"),
    ({"CLERK_JWT_KEY": "x", "CLERK_JWKS_URL": "", "CLERK_PUBLISHABLE_KEY": "", "CLERK_SECRET_KEY": ""}, "keys_skipped", "skipped"),
    ({"DATABASE_URL": "postgresql://nobody:hidden@127.0.0.1:1/none"}, "database_unreachable", "wrong"),
    ({"DATABASE_URL": "postgresql://nobody:hid@den@127.0.0.1:1/none"}, "database_unreachable", "wrong"),
    ({"DATABASE_URL": "mysql://hidden"}, "database_skipped", "skipped"),
    ({"DYNO": "web.1"}, "sqlite_on_platform", "wrong"),
]


@pytest.mark.parametrize(("changes", "code", "level"), MISTAKES)
def test_finds_each_mistake(
    clerk: PretendedClerk,
    instance: Issuer,
    backend: Backend,
    tmp_path: Path,
    changes: dict[str, str],
    code: str,
    level: str,
) -> None:
    """By a code of its own, whatever else is wrong."""
    backend.secret_key = "sk_test_ofThisInstance"
    variables = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/none.db", "CLERK_JWKS_URL": instance.url}
    variables |= {"CLERK_API_URL": backend.api_url, "CLERK_SECRET_KEY": backend.secret_key}
    found = find(variables | changes)
    assert found[code].level == level
    assert "hidden" not in repr(found)
    looked_at = {"database_not_migrated", "database_unreachable", "database_skipped"}
    assert looked_at & found.keys(), "one mistake hides no other"
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(("off", "expected"), [(0, "clock_right"), (60, "clock_off"), (-400, "clock_wrong")])
def test_finds_a_wrong_clock(clerk: PretendedClerk, backend: Backend, off: int, expected: str) -> None:
    """By the Date of Clerk's answer."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=off), usegmt=True)

    def answer(_backend: Any, request: Any) -> None:
        request.date_time_string = lambda *_: date
        answering(200, b"{}")(backend, request)

    backend.always = answer
    assert expected in levels(clerk.environ | {"CLERK_API_URL": backend.api_url, "CLERK_JWKS_URL": LOST, "DATABASE_URL": "mysql://"})


def test_finds_what_the_tables_say(well: dict[str, str], make_service: MakeService) -> None:
    """Failed messages, silence, and rows that nobody filled in; a migration that is missing."""
    service = make_service(**well)
    assert levels(well)["webhook_never_received"] == "warning"
    with broken_users(service):
        service.deliver(user_event(clerk_id("user")))
    user_id = clerk_id("user")
    service.call(user_id)
    assert levels(well).items() >= {"messages_failed": "wrong", "users_filled": "ok", "webhook_received": "ok"}.items()
    service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00.000000'")
    service.rows("UPDATE webhook_messages SET received_at = '2020-01-01 00:00:00.000000'")
    found = find(well)
    expected = {"messages_well": "ok", "users_unfilled": "wrong", "webhooks_silent": "warning"}
    assert {code: found[code].level for code in expected} == expected
    [(revision,)] = service.rows("SELECT version_num FROM alembic_version")
    service.rows("UPDATE alembic_version SET version_num = '0001'")
    try:
        assert levels(well)["database_not_migrated"] == "wrong"
        service.rows("UPDATE alembic_version SET version_num = 'later'")
        assert levels(well)["schema_newer"] == "warning"
    finally:
        service.rows(f"UPDATE alembic_version SET version_num = '{revision}'")


def test_finds_an_env_file_that_others_may_read(tmp_path: Path) -> None:
    """In the repository, not ignored by it, or readable by others of this machine."""
    settings, _ = diagnosis.read_settings({})

    def codes() -> list[str]:
        return [finding.code for finding in configuration.check_env_file(diagnosis.Case({}, settings, (), tmp_path))]

    file, ignored = tmp_path / ".env", tmp_path / ".gitignore"
    assert codes() == ["env_file_absent"]
    file.write_text("PORT=8000")
    file.chmod(0o600)
    assert codes() == ["env_file_git_unknown"]
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert codes() == ["env_file_not_ignored"]
    ignored.write_text(".env\n")
    assert codes() == ["env_file_private"]
    file.chmod(0o644)
    assert codes() == ["env_file_readable"]
    subprocess.run(["git", "add", "--force", ".env"], cwd=tmp_path, check=True)
    assert codes() == ["env_file_committed", "env_file_readable"]


def test_goes_on_after_a_check_that_breaks() -> None:
    """And says which one, without the error's text."""

    def check_broken(_case: diagnosis.Case) -> Iterator[diagnosis.Finding]:
        raise RuntimeError("hidden")

    found = find({}, checks=(check_broken, configuration.check_settings))
    assert list(found) == ["check_broken", "variable_wrong"]


def test_waits_for_nothing_for_long(clerk: PretendedClerk, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Clerk that takes the question and says nothing is passed over."""
    monkeypatch.setattr(findings, "SECONDS", 0.2)
    backend.always = stalling
    keys = {"CLERK_API_URL": backend.api_url, "CLERK_SECRET_KEY": backend.secret_key, "CLERK_JWKS_URL": f"{backend.api_url}/keys"}
    found = levels(clerk.environ | keys | {"DATABASE_URL": "mysql://", "CLERK_PUBLISHABLE_KEY": ""})
    expected = {"clock_not_compared": "skipped", "secret_key_not_tried": "skipped", "jwt_keys_not_compared": "skipped"}
    assert {code: found[code] for code in expected} == expected


def run(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], *arguments: str) -> Result:
    """Run it with nothing but *variables* in the environment."""
    for name in VARIABLES:
        monkeypatch.setenv(name, variables.get(name, ""))
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_says_what_to_do(monkeypatch: pytest.MonkeyPatch, well: dict[str, str], service: Service) -> None:
    """As text with a mark and a remedy, as JSON with codes; the status is 1 only if something is wrong."""
    del service
    text = run(monkeypatch, well)
    assert text.exit_code == 0
    assert "  ✓ clock                    This machine's clock is right, to some seconds." in text.output
    broken = well | {"PORT": "x", "CLERK_AUTHORIZED_PARTIES": ""}
    text = run(monkeypatch, broken)
    assert text.exit_code == 1
    assert "  ✗ PORT                     PORT is not a number from 1 to 65535.\n      A free TCP port, such as 8000.\n" in text.output
    as_json = run(monkeypatch, broken, "--json")
    findings = json.loads(as_json.output)
    assert (as_json.exit_code, findings[0]["code"], findings[0]["level"]) == (1, "variable_wrong", "wrong")
    assert findings[0].keys() == {"level", "code", "subject", "what", "remedy"}


def test_works_where_the_service_refuses_to_start(tmp_path: Path) -> None:
    """Without any setting, from anywhere, and without a traceback."""
    variables = environ(CLERK_API_URL="http://127.0.0.1:1", CLERK_WEBHOOK_SECRET="sk_test_hidden", DATABASE_URL="\x1b[31mmysql://hidden")
    command = [sys.executable, "-m", "clerkhooks", "doctor"]
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "CLERK_WEBHOOK_SECRET is an API key" in ended.stdout
    assert "DATABASE_URL is not a database URL." in ended.stdout
    assert "hidden" not in ended.stdout


@pytest.mark.parametrize(
    ("content", "problem"), [(b"PORT=\xff\xfe", ".env is not text in UTF-8."), (b'AUDIENCE="x\0y"', ".env cannot be read.")]
)
def test_says_that_dotenv_is_no_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, well: dict[str, str], content: bytes, problem: str
) -> None:
    """And goes on with the rest."""
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.setattr("clerkhooks.settings.PROJECT", tmp_path)
    result = run(monkeypatch, well, "--json")
    findings = json.loads(result.output)
    assert (result.exit_code, findings[0]["code"], findings[0]["what"], len(findings) > 5) == (1, "variable_wrong", problem, True)
