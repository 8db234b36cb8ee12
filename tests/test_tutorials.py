"""The tutorials show the tested examples, and their commands run as they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import PROJECT
from tests.backend import Backend
from tests.documentation import Block, blocks, read_page, run_blocks
from tests.server import environ, free_port

EXAMPLE = PROJECT / "tests/examples/notes"


@pytest.mark.parametrize(
    ("name", "file"), [("notes.py", "app.py"), ("test_notes.py", "test_app.py")]
)
def test_shows_the_complete_example(name: str, file: str) -> None:
    """The blocks of a file, one after the other, are the tested example."""
    shown = [block.text for block in local_blocks("application") if block.caption == name]
    code = (EXAMPLE / file).read_text().replace("tests.examples.notes.app", "notes")
    assert "\n\n".join(shown) == code


@pytest.mark.slow
def test_builds_the_application(tmp_path: Path) -> None:
    """The commands create the tables, deliver an event and pass the test."""
    port = str(free_port())
    variables = {"PORT": port, "FLASK_RUN_PORT": port, "PYTHONPATH": str(PROJECT)}
    output = run_blocks(local_blocks("application"), tmp_path, environ(**variables))
    assert '"outcome": "applied"' in output
    assert "Ada Lovelace" in output
    assert "1 passed" in output


@pytest.mark.slow
def test_starts_the_service(clerk: FakeClerk, tmp_path: Path) -> None:
    """The commands demonstrate, configure, migrate and start the service, and deliver events."""
    for name in ("clerkhooks", "migrations"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    for name in ("wsgi.py", "gunicorn.conf.py", ".env.example"):
        shutil.copy(PROJECT / name, tmp_path)
    variables = {"PORT": str(free_port()), "PYTHONPATH": str(tmp_path)}
    with Backend(secret_key="sk_test_0123456789abcdef").open() as backend:
        variables |= clerk.environ | backend.environ
        output = run_blocks(local_blocks("service"), tmp_path, environ(**variables))
    assert "All 13 checks passed." in output
    assert '"outcome": "applied"' in output
    assert "Ada Lovelace" in output
    assert "Compared 0 users" in output


def local_blocks(tutorial: str) -> list[Block]:
    """Return the blocks of a tutorial that concern the reader's own machine."""
    text, _, _ = read_page(f"tutorials/{tutorial}").partition("Deploy it\n")
    return blocks(text)
