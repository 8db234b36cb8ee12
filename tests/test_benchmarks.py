"""The command that runs the benchmarks; the benchmarks themselves are run manually."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from clerkhooks.settings import PROJECT
from tests.benchmarks.__main__ import SHORT, find_benchmarks, main

NAMES = {
    *("bare_sqlite", "console", "disk", "flood", "floor", "overload", "session_tokens", "sync"),
    *("cold", "hosts", "memory"),
}


def test_lists_every_benchmark() -> None:
    """``--help`` lists every benchmark without running any."""
    command = [sys.executable, "-m", "tests.benchmarks", "--help"]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    listed = {line.split()[0] for line in ended.stdout.splitlines() if line.startswith("  ")}
    assert listed >= NAMES


def test_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown name causes exit status 2 before any benchmark runs."""
    with pytest.raises(SystemExit) as ended:
        main(["overload", "sevrice"])
    assert ended.value.code == 2
    assert "no such benchmark: sevrice" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(find_benchmarks()))
def test_each_benchmark_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each benchmark's ``--help`` lists the options that a short run uses."""
    benchmark = importlib.import_module(f"tests.benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in SHORT.get(name, "").split() if option[:2] == "--")
