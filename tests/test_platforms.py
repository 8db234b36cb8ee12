"""Every variable, command and path in the deployment files exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli.main import main
from clerkhooks.settings import PROJECT, VARIABLES
from clerkhooks.web.state import disconnect
from tests.server import environ, free_port
from tests.support import rows

PROCFILE = dict(
    line.split(": ", 1) for line in (PROJECT / "Procfile").read_text().splitlines() if line
)
OF_POSTGRES = {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"}
FILES = ("app.json", "render.yaml", "railway.json", "fly.toml", ".do/deploy.template.yaml")


def load(name: str) -> Any:
    """Return the parsed content of a deployment file."""
    text = (PROJECT / name).read_text()
    if name.endswith(".json"):
        return json.loads(text)
    return tomllib.loads(text) if name.endswith(".toml") else yaml.safe_load(text)


def find(value: Any, *keys: str) -> Iterator[Any]:
    """Yield the values of *keys*, at any depth in *value*."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys:
                yield item
            yield from find(item, *keys)
    elif isinstance(value, list):
        for item in value:
            yield from find(item, *keys)


def variables_of(name: str) -> set[str]:
    """Return the variables that a deployment file sets."""
    content, found = load(name), set[str]()
    for listed in find(content, "envVars", "envs"):
        found |= {one["key"] for one in listed}
    for mapping in find(content, "env", "environment"):
        found |= set(mapping)
    return found


@pytest.mark.parametrize("name", [*FILES, "compose.yaml"])
def test_sets_only_variables_that_are_read(name: str) -> None:
    """Deployment files contain no misspelled variables, which the service would ignore."""
    assert variables_of(name) - OF_POSTGRES <= set(VARIABLES)


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in ("railway.json", "fly.toml")]
)
def test_asks_for_the_secret(name: str) -> None:
    """Each file asks for the secret except Railway's and Fly's, whose formats do not allow it."""
    assert "CLERK_WEBHOOK_SECRET" in variables_of(name)


def test_serves_and_migrates_with_the_same_commands_everywhere() -> None:
    """All platforms run the commands in the Procfile; Heroku and Dokku read the file itself."""
    release, web = PROCFILE["release"], PROCFILE["web"]
    assert load("fly.toml")["deploy"]["release_command"] == release
    assert load("fly.toml")["processes"] == {"web": web}
    assert load("railway.json")["deploy"]["preDeployCommand"] == [release]
    assert load("railway.json")["deploy"]["startCommand"] == web
    [service] = [one for one in load("render.yaml")["services"] if one["type"] == "web"]
    assert (service["preDeployCommand"], service["startCommand"]) == (release, web)
    spec = load(".do/deploy.template.yaml")["spec"]
    assert (spec["jobs"][0]["run_command"], spec["services"][0]["run_command"]) == (release, web)


def test_runs_commands_that_exist() -> None:
    """Scheduled jobs run existing clerkhooks commands."""
    scheduled = [one["command"] for one in load("app.json")["cron"]]
    scheduled += [one["startCommand"] for one in load("render.yaml")["services"][1:]]
    for command in scheduled:
        python, m, package, name = command.split()
        assert (python, m, package) == ("python", "-m", "clerkhooks")
        assert name in main.commands


def test_checks_health_at_existing_routes(clerk: FakeClerk, tmp_path: Path) -> None:
    """Every health check requests a route of the service."""
    paths = {
        load("railway.json")["deploy"]["healthcheckPath"],
        load("render.yaml")["services"][0]["healthCheckPath"],
        load("fly.toml")["http_service"]["checks"][0]["path"],
        load("app.json")["healthchecks"]["web"][0]["path"],
        load(".do/deploy.template.yaml")["spec"]["services"][0]["health_check"]["http_path"],
    }
    app = create_app(clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"})
    assert paths <= {rule.rule for rule in app.url_map.iter_rules()}
    disconnect(app)


def test_listens_on_the_port_that_fly_forwards_to() -> None:
    """The two ports in Fly's file are equal."""
    fly = load("fly.toml")
    assert int(fly["env"]["PORT"]) == fly["http_service"]["internal_port"]


def instructions() -> list[tuple[str, str]]:
    """Return the name and arguments of each instruction of the Dockerfile."""
    text = (PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


@contextmanager
def running(command: list[str], root: Path, variables: dict[str, str]) -> Iterator[None]:
    """Run a server until the block ends."""
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=root, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.mark.slow
def test_builds_and_serves_as_the_dockerfile_says(clerk: FakeClerk, tmp_path: Path) -> None:
    """The Dockerfile's steps, run in an empty directory, start a healthy, migrated service."""
    root = tmp_path / "app"
    root.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    port = free_port()
    variables = environ(**clerk.environ)
    variables["PATH"] = f"{tmp_path}/venv/bin:{variables['PATH']}"
    build(root, variables)
    named = dict(instructions())
    health, command = (
        json.loads(named["HEALTHCHECK"].partition("CMD ")[2]),
        json.loads(named["CMD"]),
    )
    variables["PORT"] = str(port)
    with running(command, root, variables):
        deadline = time.monotonic() + 60
        while subprocess.run(
            health, cwd=root, env=variables, stderr=subprocess.DEVNULL, timeout=30
        ).returncode:
            assert time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            assert answer.status == 200
    assert (root / "instance" / "clerkhooks.db").exists()
    assert not (root / "tests").exists()


def build(root: Path, variables: dict[str, str]) -> None:
    """Run the Dockerfile's build steps in *root*, and add its ENV values to *variables*."""
    for name, rest in instructions():
        if name == "COPY":
            copy(rest.split()[0], root)
        elif name == "RUN":
            without_user = re.sub(r"useradd .*? && |&& chown .*", "", rest)
            subprocess.run(
                without_user, shell=True, cwd=root, env=variables, check=True, timeout=300
            )
        elif name == "ENV":
            key, _, value = rest.partition("=")
            variables[key] = value
        else:
            known = ("FROM", "WORKDIR", "USER", "EXPOSE", "VOLUME", "HEALTHCHECK", "CMD")
            assert name in known, name


def copy(source: str, root: Path) -> None:
    """Copy a file, or the build context without the entries listed in .dockerignore."""
    if source != ".":
        shutil.copy(PROJECT / source, root)
        return
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20
    )
    ignored = (PROJECT / ".dockerignore").read_text().split()
    for name in listed.stdout.splitlines():
        if name.partition("/")[0] not in ignored:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, root / name)


def test_does_not_run_as_root() -> None:
    """The image's server runs as a system user."""
    named = dict(instructions())
    assert named["USER"] == "clerkhooks"
    assert "useradd --system" in (PROJECT / "Dockerfile").read_text()


def test_checks_health_at_the_configured_port() -> None:
    """The image's health check reads ``PORT``, which platforms set."""
    named = dict(instructions())
    command = json.loads(named["HEALTHCHECK"].partition("CMD ")[2])
    assert shlex.join(command).count("PORT") == 1


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the commands that would have replaced this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, command: commands.append(command[1:]))
    return commands


def test_serve_migrates_and_becomes_gunicorn(
    clerk: FakeClerk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executed: list[list[str]]
) -> None:
    """``serve --migrate`` migrates, then executes gunicorn with the remaining arguments."""
    monkeypatch.chdir(PROJECT)
    url = f"sqlite:///{tmp_path}/served.db"
    for name, value in (clerk.environ | {"DATABASE_URL": url}).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["serve", "--migrate", "--workers", "1"])
    assert (result.exit_code, executed) == (
        0,
        [["-m", "gunicorn", "wsgi:app", "--workers", "1"]],
    )
    assert rows(url, "SELECT count(*) FROM webhook_messages") == [(0,)]


def test_serve_reports_a_database_that_is_away(
    clerk: FakeClerk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executed: list[list[str]]
) -> None:
    """If the database is unavailable, ``serve`` prints an error and does not start gunicorn."""
    monkeypatch.chdir(PROJECT)
    (tmp_path / "file").mkdir()
    for name, value in (clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/file"}).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["serve", "--migrate"])
    assert (result.exit_code, executed) == (2, [])
    assert "Database error (OperationalError SQLITE_CANTOPEN)" in result.output


def test_serve_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executed: list[list[str]]
) -> None:
    """``serve`` fails in an installed package, which has no wsgi.py."""
    monkeypatch.setattr("clerkhooks.cli.serve.PROJECT", tmp_path)
    result = CliRunner().invoke(main, ["serve"])
    assert (result.exit_code, executed) == (1, [])
    assert "wsgi.py is missing" in result.output
