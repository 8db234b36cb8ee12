"""The README agrees with the code."""

from __future__ import annotations

import re

import pytest

import clerkhooks
from clerkhooks.cli.main import main
from clerkhooks.settings import PROJECT, VARIABLES

README = (PROJECT / "README.md").read_text()
EXAMPLE = PROJECT / "tests/examples/notes"


def shown(section: str) -> dict[str, str]:
    """Return the Python files that a section shows, by the name in their first line."""
    _, _, rest = README.partition(f"\n## {section}\n")
    text, _, _ = rest.partition("\n## ")
    return dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize(
    ("name", "file"), [("notes.py", "app.py"), ("test_notes.py", "test_app.py")]
)
def test_shows_the_complete_example(name: str, file: str) -> None:
    """The tutorial shows the tested example; only the module's name differs."""
    code = (EXAMPLE / file).read_text().replace("tests.examples.notes.app", "notes")
    assert shown("Use the extension")[name] == code


@pytest.mark.parametrize("variable", sorted(set(VARIABLES) - {"DYNO"}))
def test_explains_every_variable(variable: str) -> None:
    """Every configuration variable is described."""
    assert f"`{variable}`" in README


@pytest.mark.parametrize("name", sorted(set(clerkhooks.__all__) - {"Outcome", "create_app"}))
def test_mentions_every_public_name(name: str) -> None:
    """Every public name is mentioned."""
    assert name in README


@pytest.mark.parametrize("command", sorted(main.commands))
def test_explains_every_command(command: str) -> None:
    """Every command is described."""
    assert re.search(rf"`(clerkhooks )?{command}\b", README)
