"""``clerkhooks dev`` runs the whole service here, with the real gunicorn and real signals."""

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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from flask import Flask

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli import demonstration, dev, server
from clerkhooks.cli.dev import Files, Refused, prepare_database, run, server_environ
from clerkhooks.cli.main import main
from clerkhooks.cli.server import ServerFailed, ask, running_server
from clerkhooks.settings import PROJECT, VARIABLES, ServiceSettings, read_environ
from clerkhooks.web import logs

SERVING = "README.md"  # the last line before it only serves
HOSTILE = dict.fromkeys(VARIABLES, "broken") | {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "GUNICORN_CMD_ARGS": "--nonsense",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the application's logger from holding on to the output of one test."""
    monkeypatch.setattr(logs.logger, "handlers", [logging.NullHandler()])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A place of its own for a run in this process."""
    return Files(tmp_path / "instance")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout, so that its .env and its instance folder may be played with."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("clerkhooks", "migrations"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=ignored)
    for name in ("wsgi.py", "gunicorn.conf.py"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A free port, taken as dev does, so that nothing answers on it yet."""
    with dev._listening(0) as listener:
        yield listener


def command(*arguments: str) -> list[str]:
    """Return the command line of a run on any free port."""
    return [sys.executable, "-m", "clerkhooks", "dev", "--port", "0", *arguments]


class Stage(io.StringIO):
    """An output that calls a function when a text is written to it."""

    def __init__(self, cue: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.cue, self.act = cue, act

    def write(self, text: str) -> int:
        """Take *text*; act if it has the cue."""
        written = super().write(text)
        if self.cue in text:
            self.act()
        return written


@contextmanager
def serving(checkout: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a run in a process of its own; yield it when it serves, and what it has printed."""
    with subprocess.Popen(command(), cwd=checkout, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)  # ends the wait for the line
        watchdog.start()
        printed = []
        for line in process.stdout:
            printed.append(line)
            if SERVING in line:
                break
        watchdog.cancel()
        try:
            yield process, "".join(printed)
        finally:
            process.kill()


def server_processes(files: Files) -> list[int]:
    """Return the master and the two workers, as gunicorn's log names them."""
    pattern = re.compile(r"\] \[(\d+)\] \[INFO\] (?:Listening|Booting)")
    deadline = time.monotonic() + 10
    while len(found := pattern.findall(files.log.read_text())) < 3:
        assert time.monotonic() < deadline, files.log.read_text()
        time.sleep(0.01)
    return [int(number) for number in found]


def is_running(process_id: int) -> bool:
    """Return whether a process is there, and is not a zombie."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def are_gone(processes: list[int]) -> bool:
    """Return whether all of them end within 2 s: a killed process takes a moment to die."""
    deadline = time.monotonic() + 2
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, processes))


def test_shows_the_main_job_and_ends_with_0(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Every step is ticked, the table is read from the file, and all of it fits on one screen.

    What an earlier run left is gone.
    """
    files.folder.mkdir()
    for suffix in ("", "-wal", "-shm"):
        files.database.with_name(files.database.name + suffix).write_text("of an earlier run")
    assert run(files, 0, once=True) == 0
    printed = capsys.readouterr().out
    assert printed.count("✓") == 15
    assert "✗" not in printed
    assert [row[1] for row in demonstration.read_rows(files.database)] == [
        "Ada Lovelace",
        "Grace Hopper",
        "Deleted User",
    ]
    assert len(printed.splitlines()) <= 40
    assert max(map(len, printed.replace(str(files.folder), "instance").splitlines())) <= 100
    assert "whsec_" not in printed + files.log.read_text()


def test_ends_with_1_if_the_table_is_wrong(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script can rely on the status."""
    monkeypatch.setattr(demonstration.Story, "rows", lambda _: [])
    assert run(files, 0, once=True) == 1
    assert "✗ 1 of 13 checks failed." in capsys.readouterr().out


def test_shows_what_came_instead_of_what_had_to(
    files: Files, listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that fails shows a cross, the answer, and what was expected."""
    clerk = FakeClerk()
    files.folder.mkdir()
    environ = server_environ(os.environ, clerk, files.database, "")
    prepare_database(files.database, environ)
    port = listener.getsockname()[1]
    listener.close()
    assert not demonstration.show(demonstration.Story(clerk), port, files.database)
    printed = capsys.readouterr().out
    assert re.search(
        r"✗ webhook user.created +no answer \(ConnectionRefusedError\) *expected: 200 applied",
        printed,
    )
    assert "✗ 13 of 13 checks failed." in printed


def test_never_looks_at_what_is_configured(checkout: Path) -> None:
    """Neither variables nor .env count, nor does gunicorn's own variable."""
    lines = [f"{name}=also-broken" for name in VARIABLES]
    (checkout / ".env").write_text(
        "\n".join([*lines, f"DATABASE_URL=sqlite:///{checkout}/precious.db"])
    )
    ended = subprocess.run(
        command("--once"),
        cwd=checkout,
        env=os.environ | HOSTILE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(path.name for path in checkout.rglob("*.db")) == ["clerkhooks-dev.db"]


def test_leaves_no_variable_for_env_to_fill(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variable is given to the server, empty if dev does not need it: it wins over .env."""
    files.folder.mkdir()
    environ = server_environ(HOSTILE | {"PATH": "/bin"}, FakeClerk(), files.database, "")
    assert environ.keys() == VARIABLES.keys() | {"PATH"}
    assert "broken" not in environ.values()
    (tmp_path / ".env").write_text("\n".join(f"{name}=broken" for name in VARIABLES))
    monkeypatch.setattr(os, "environ", environ)
    assert read_environ(tmp_path) == environ
    settings = ServiceSettings.from_mapping(environ)
    assert settings.database_url == f"sqlite:///{files.database}"


def test_goes_on_serving_with_a_token_that_works(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the demonstration the printed call can be made; a signal ends it with status 0."""
    answers: list[str] = []

    def call_and_stop() -> None:
        words = re.search(
            r"curl -H '(Authorization): (.+)' http://127.0.0.1:(\d+)(/api/me)", stage.getvalue()
        )
        assert words is not None
        answers.append(ask(int(words[3]), "GET", words[4], {words[1]: words[2]}))
        signal.raise_signal(signal.SIGTERM)

    stage = Stage(SERVING, call_and_stop)
    handler = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(stage):
        assert run(files, 0, once=False) == 0
    assert answers == ["200 Ada Lovelace"]
    assert signal.getsignal(signal.SIGTERM) == handler
    assert are_gone(server_processes(files))


def test_says_so_when_the_server_ends_by_itself(files: Files) -> None:
    """It ends as well, with an error."""
    stage = Stage(SERVING, lambda: os.kill(server_processes(files)[0], signal.SIGKILL))
    with (
        redirect_stdout(stage),
        pytest.raises(ServerFailed, match="ended by itself, with status -9") as failure,
    ):
        run(files, 0, once=False)
    assert failure.value.exit_code == 1
    assert are_gone(server_processes(files))


def test_stops_in_the_middle_of_the_demonstration(files: Files) -> None:
    """Ctrl-C works at every moment."""
    with (
        redirect_stdout(Stage("user.updated", lambda: signal.raise_signal(signal.SIGINT))),
        pytest.raises(KeyboardInterrupt),
    ):
        run(files, 0, once=True)
    processes = server_processes(files)
    assert processes
    assert are_gone(processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_leaves_no_process_behind(checkout: Path, number: signal.Signals) -> None:
    """Each signal ends it at once, with status 0 and without a traceback."""
    with serving(checkout) as (process, _):
        processes = server_processes(Files(checkout / "instance"))
        assert len(processes) == 3
        assert all(map(is_running, processes))
        process.send_signal(number)
        rest, _ = process.communicate(timeout=5)
    assert (process.returncode, rest.strip()) == (0, "Stopping.")
    assert are_gone(processes)


def test_takes_the_server_along_when_it_is_killed(checkout: Path) -> None:
    """SIGKILL leaves no time to clean up; the guard does it."""
    with serving(checkout) as (process, _):
        processes = server_processes(Files(checkout / "instance"))
        process.kill()
    assert are_gone(processes)


def test_refuses_a_second_run_in_the_same_checkout(files: Files) -> None:
    """Both would use one database, whatever their ports; the message names the first run."""
    with dev._sole_run(files):
        files.lock.write_text("process 7, http://127.0.0.1:8000")
        files.database.write_text("of the first")
        with pytest.raises(
            Refused, match=r"already runs .*process 7, http://127.0.0.1:8000"
        ) as refusal:
            run(files, 0, once=True)
    assert refusal.value.exit_code == 2
    assert files.database.read_text() == "of the first"


def test_names_the_port_that_is_taken(
    files: Files, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with status 2 and a remedy before anything is touched."""
    monkeypatch.setattr(Flask, "auto_find_instance_path", lambda _: str(files.folder))
    listener.listen()
    port = listener.getsockname()[1]
    result = CliRunner().invoke(main, ["dev", "--port", str(port)])
    assert result.exit_code == 2
    assert f"Port {port} is taken by another program." in result.stderr
    assert "clerkhooks dev --port " in result.stderr
    assert not files.database.exists()


def test_says_why_a_port_cannot_be_used(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port may be refused for other reasons."""
    monkeypatch.setattr(dev, "HOST", "203.0.113.1")
    with pytest.raises(Refused, match="Port 8000 cannot be used: "):
        run(files, 8000, once=True)


def test_refuses_a_folder_that_it_cannot_write_to(files: Files) -> None:
    """The message names the folder."""
    files.folder.write_text("a file")
    with pytest.raises(Refused, match=re.escape(f"Cannot write to {files.folder}: ")):
        run(files, 0, once=True)


def test_asks_for_a_checkout(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package installed from a wheel has no wsgi.py, no configuration and no migrations."""
    monkeypatch.setattr(dev, "PROJECT", files.folder)
    missing = r"no wsgi\.py and no gunicorn\.conf\.py and no migrations"
    with pytest.raises(Refused, match=missing) as refusal:
        run(files, 0, once=True)
    assert "pip install -e ." in refusal.value.message
    assert not files.folder.exists()


def test_shows_the_log_of_a_server_that_does_not_start(
    tmp_path: Path, listener: socket.socket
) -> None:
    """The server's own message is shown."""
    environ = server_environ(os.environ, FakeClerk(), tmp_path / "database", "") | {
        "CLERK_WEBHOOK_SECRET": "broken"
    }
    with (
        pytest.raises(ServerFailed, match="CLERK_WEBHOOK_SECRET is not a signing secret"),
        running_server(listener, environ, tmp_path / "log"),
    ):
        pytest.fail("it began")


def test_gives_up_on_a_server_that_stays_silent(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the server is bounded."""
    monkeypatch.setattr(server, "START_WITHIN", 0)
    environ = server_environ(os.environ, FakeClerk(), tmp_path / "database", "")
    with (
        pytest.raises(ServerFailed, match="did not answer within 0 s"),
        running_server(listener, environ, tmp_path / "log"),
    ):
        pytest.fail("it began")


def test_leaves_no_guard_behind_if_nothing_could_start(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard is started first, and ended in every case."""
    guards: list[int] = []
    kill = os.killpg

    def record_and_kill(group: int, number: int) -> None:
        guards.append(group)
        kill(group, number)

    monkeypatch.setattr(os, "killpg", record_and_kill)
    with (
        pytest.raises(FileNotFoundError),
        running_server(listener, {}, tmp_path / "missing" / "log"),
    ):
        pytest.fail("it began")
    assert [is_running(guard) for guard in guards] == [False]


def test_survives_a_closed_terminal_under_nohup() -> None:
    """A SIGHUP that was ignored before stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.signals_as(signal.default_int_handler):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "✓✗"), ("ascii", "+x")])
def test_writes_what_the_terminal_can_show(encoding: str, marks: str) -> None:
    """A tick that cannot be encoded would end the run."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)):
        shown = demonstration.mark(True) + demonstration.mark(False)
    assert shown == marks


@pytest.mark.parametrize(
    ("variables", "printed"), [({"NO_COLOR": ""}, "\x1b[31m"), ({"NO_COLOR": "1"}, "well")]
)
def test_leaves_colour_out_where_asked_to(
    variables: dict[str, str], printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR counts when it is not empty."""

    def say(*_: object, once: bool) -> int:
        click.secho("well", fg="red")
        return 0

    monkeypatch.setattr(dev, "run", say)
    result = CliRunner().invoke(main, ["dev"], env=variables, color=True)
    assert result.exit_code == 0
    assert result.output.startswith(printed)


@pytest.mark.parametrize(
    "arguments", [["dev", "--port", "65536"], ["dev", "--nonsense"], ["nonsense"]]
)
def test_refuses_wrong_use_with_2(arguments: list[str]) -> None:
    """Statuses are what a script reads."""
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--help says what it needs and does; python -m clerkhooks is the same command."""
    monkeypatch.setattr(sys, "argv", ["clerkhooks", "dev", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("clerkhooks", run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "Needs no Clerk account" in printed
    assert "--once" in printed
    assert "--port" in printed
