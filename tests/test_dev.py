"""``clerkhooks dev`` runs the service on this machine and demonstrates it."""

from __future__ import annotations

import io
import logging
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli import demonstration, dev
from clerkhooks.cli.demonstration import Demonstration
from clerkhooks.cli.dev import run
from clerkhooks.cli.main import main
from clerkhooks.cli.options import CannotDo, mark
from clerkhooks.settings import PROJECT, VARIABLES
from clerkhooks.web import logs
from clerkhooks.web.state import disconnect
from tests.server import environ

TIMEOUT = 60  # seconds, after which a command that is not serving is killed
SERVING = "README.md"  # printed in the last line before the command waits
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HOSTILE = dict.fromkeys(VARIABLES, "broken") | {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "HTTP_PROXY": "http://127.0.0.1:1",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the logger's handlers, which may write to the output of an earlier test."""
    monkeypatch.setattr(logs.logger, "handlers", [logging.NullHandler()])


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restore the signal handlers that a run in this process has replaced."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    logging.disable(logging.NOTSET)  # a demonstration disables logging
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Redirect temporary files to a folder for this test, and return the folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def start(*arguments: str, folder: Path = PROJECT) -> subprocess.Popen[str]:
    """Start the command on a free port, in a separate process."""
    # Do not measure the coverage of a copy of the package.
    ignored = "COV" if folder != PROJECT else "-"
    environ = {name: text for name, text in os.environ.items() if not name.startswith(ignored)}
    return subprocess.Popen(
        [sys.executable, "-m", "clerkhooks", "dev", "--port", "0", *arguments],
        cwd=folder,
        env=environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def serving(**options: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command and wait until it is serving; yield its process and its output."""
    with start(**options) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            printed = ""
            for line in process.stdout:
                printed += line
                if SERVING in line:
                    break
            assert SERVING in printed, f"the command has ended or does not serve:\n{printed}"
            yield process, printed
        finally:
            watchdog.cancel()
            process.kill()


def printed_call(printed: str) -> tuple[str, dict[str, str]]:
    """Return the URL and the headers of the printed curl command."""
    found = re.search(r"curl -H '(Authorization): (.+)' (http://127.0.0.1:\d+/api/me)", printed)
    assert found is not None, printed
    return found[3], {found[1]: found[2]}


class Stage(io.StringIO):
    """An output stream that calls *act* when text containing *cue* is written to it."""

    def __init__(self, cue: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.cue, self.act = cue, act

    def write(self, text: str) -> int:
        """Write *text*. If it contains *cue*, also call *act*."""
        written = super().write(text)
        if self.cue in text:
            self.act()
        return written


def test_passes_every_check_and_ends_with_0(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step has a tick, the output fits on one screen, and no file is left behind."""
    assert run(0, once=True)
    printed = capsys.readouterr().out
    assert printed.count("✓") == 16, "13 checks, the database, the server and the last line"
    assert "✗" not in printed
    assert "✓ All 13 checks passed." in printed
    names = re.findall(r"^user_\w+  (\w+ \w+)  ", printed, re.MULTILINE)
    assert names == ["Ada Lovelace", "Grace Hopper", "Deleted User"]
    assert len(printed.splitlines()) <= 40
    assert max(map(len, printed.replace(str(temporary), "/tmp").splitlines())) <= 100
    assert "  ✓ SELECT … FROM users             3 rows     " in printed
    _, _, table = printed.partition("two users and a tombstone\n")
    assert max(map(len, table.splitlines())) <= 80
    assert "whsec_" not in printed
    assert list(temporary.iterdir()) == []


def test_ends_with_1_if_the_table_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a check fails, the exit status is 1, so that a script can detect it."""
    monkeypatch.setattr(demonstration, "_QUERY", "SELECT 1 WHERE false")
    result = CliRunner().invoke(main, ["dev", "--once", "--port", "0"])
    assert result.exit_code == 1
    assert "✗ 1 of 13 checks failed." in result.stdout
    assert re.search(r"✗ SELECT … FROM users +0 rows +expected: two users", result.stdout)


def test_shows_the_expected_answer_of_a_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed step shows a cross, the actual response and the expected response."""
    app = dev._create_app(FakeClerk(), tmp_path / "clerkhooks.db", "a-password-of-the-test")
    stranger = FakeClerk()
    assert not Demonstration(app, stranger).run(tmp_path / "clerkhooks.db")
    disconnect(app)
    printed = capsys.readouterr().out
    assert re.search(
        r"✗ webhook user.created +401 signature_mismatch +expected: 200 applied", printed
    )
    assert "✗ 12 of 13 checks failed." in printed, "only the forged webhook is refused as expected"


def test_ignores_the_users_own_configuration(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Environment variables, .env and a proxy have no effect. No file is left behind.

    The command works without wsgi.py and migrations, which a wheel does not contain.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "clerkhooks", tmp_path / "clerkhooks", ignore=ignored)
    (tmp_path / ".env").write_text("\n".join(f"{name}=also-broken" for name in VARIABLES))
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    with start("--once", folder=tmp_path) as process:
        try:
            printed, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert (process.returncode, "✓ All 13 checks passed." in printed) == (0, True), printed
    after = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_keeps_serving_with_a_token_and_a_console_that_work(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed curl command and console password work until SIGTERM ends the run."""
    answers: list[object] = []

    def call_and_stop() -> None:
        url, headers = printed_call(stage.getvalue())
        found = httpx.get(url, headers=headers, trust_env=False)
        answers.append(found.json()["name"])
        console = re.search(r"(http:\S+/console), any user name, password (\w+)", stage.getvalue())
        assert console is not None
        page = httpx.get(console[1], auth=("", console[2]), trust_env=False, follow_redirects=True)
        answers.append(page.status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    caller = threading.Thread(target=call_and_stop, daemon=True)
    watchdog = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
    stage = Stage(SERVING, caller.start)
    watchdog.start()
    with redirect_stdout(stage):
        assert run(0, once=False)
    watchdog.cancel()
    assert answers == ["Ada Lovelace", 200]
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_prints_a_command_that_posts_another_webhook(tmp_path: Path) -> None:
    """It works as printed in another folder, without other settings or an active environment."""
    pattern = r"^  (CLERK_WEBHOOK_SECRET=whsec_\S+ .+ -m clerkhooks send .+)$"
    with serving() as (_, printed):
        [line] = re.findall(pattern, printed, re.MULTILINE)
        posted = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=tmp_path,
            env=environ(PATH="/usr/bin:/bin"),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert (posted.returncode, posted.stderr) == (0, "")
    assert '200 {"outcome": "applied"' in posted.stdout


def test_logs_requests_once_the_demonstration_is_over() -> None:
    """The demonstration's own requests are not logged, but later requests are."""
    with serving() as (process, printed):
        assert '"request"' not in printed
        url, headers = printed_call(printed)
        httpx.get(url, headers=headers, trust_env=False)
        process.terminate()
        rest, _ = process.communicate(timeout=10)
    assert '"path": "/api/me"' in rest


def test_can_be_interrupted_during_the_demonstration(temporary: Path) -> None:
    """Ctrl-C works during the demonstration, and no file is left behind."""
    with (
        redirect_stdout(Stage("user.updated", lambda: signal.raise_signal(signal.SIGINT))),
        pytest.raises(KeyboardInterrupt),
    ):
        run(0, once=True)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGHUP)),
    ],
    ids=lambda number: number.name,
)
def test_leaves_nothing_behind(temporary: Path, number: signal.Signals) -> None:
    """
    Each signal stops the command with status 0 and without a traceback.

    The server stops as well, and the temporary files are deleted.
    """
    with serving() as (process, printed):
        assert [path.name for path in temporary.glob("*/*.db")] == ["clerkhooks.db"]
        process.send_signal(number)
        rest, _ = process.communicate(timeout=10)
    assert (process.returncode, rest.strip()) == (0, "Stopping.")
    assert list(temporary.iterdir()) == []
    url, headers = printed_call(printed)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, headers=headers, trust_env=False)


@pytest.mark.slow
def test_stops_the_server_when_it_is_killed() -> None:
    """The server is a thread of the same process, so SIGKILL ends it as well."""
    with serving() as (process, printed):
        process.kill()
        process.wait(10)
    url, headers = printed_call(printed)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, headers=headers, trust_env=False)


@pytest.mark.slow
def test_can_run_twice_at_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Each run has its own database and port."""
    with serving() as (_, printed):
        assert run(0, once=True)
        url, headers = printed_call(printed)
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 200


def test_names_a_port_that_is_taken(temporary: Path) -> None:
    """If the port is taken, the command ends with status 2 and suggests another port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = CliRunner().invoke(main, ["dev", "--port", str(port)])
    assert result.exit_code == 2
    assert f"Cannot listen on port {port}: Address already in use." in result.stderr
    assert "clerkhooks dev --port " in result.stderr
    assert list(temporary.iterdir()) == []


def test_says_why_a_port_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the port cannot be used for another reason, the error names the reason."""
    monkeypatch.setattr(dev, "HOST", "203.0.113.1")
    with pytest.raises(CannotDo, match="Cannot listen on port 8000: Cannot assign"):
        run(8000, once=True)


def test_survives_a_closed_terminal_under_nohup() -> None:
    """If SIGHUP was already ignored, it stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    dev._interrupt_on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "✓✗"), ("ascii", "+x")])
def test_prints_what_the_terminal_can_show(encoding: str, marks: str) -> None:
    """If the encoding has no tick or cross, an ASCII character is printed instead."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)):
        shown = mark(True) + mark(False)
    assert shown == marks


@pytest.mark.parametrize(
    ("variables", "printed"), [({"NO_COLOR": ""}, "\x1b[31m"), ({"NO_COLOR": "1"}, "text")]
)
def test_prints_no_colour_if_asked_to(
    variables: dict[str, str], printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR turns off colours unless the variable is empty."""

    def print_red(*_: object, once: bool) -> bool:
        click.secho("text", fg="red")
        return True

    monkeypatch.setattr(dev, "run", print_red)
    result = CliRunner().invoke(main, ["dev"], env=variables, color=True)
    assert result.exit_code == 0
    assert result.output.startswith(printed)


@pytest.mark.parametrize(
    "arguments", [["dev", "--port", "65536"], ["dev", "--nonsense"], ["nonsense"]]
)
def test_refuses_wrong_use_with_2(arguments: list[str]) -> None:
    """Incorrect usage causes exit status 2, so that a script can detect it."""
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m clerkhooks dev --help`` describes the command and its options."""
    monkeypatch.setattr(sys, "argv", ["clerkhooks", "dev", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("clerkhooks", run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "no Clerk account" in printed
    assert "--once" in printed
    assert "--port" in printed
