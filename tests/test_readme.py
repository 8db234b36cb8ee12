"""The README shows what is there."""

from __future__ import annotations

import re

import pytest

from clerkhooks.settings import PROJECT, VARIABLES

README = (PROJECT / "README.md").read_text()
EXAMPLE = PROJECT / "tests/examples/notes"


def shown(section: str) -> dict[str, str]:
    """The files that a section shows: blocks of Python whose first line is a comment with the file's name."""
    _, _, rest = README.partition(f"\n## {section}\n")
    text, _, _ = rest.partition("\n## ")
    return dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize(("name", "file"), [("notes/__init__.py", "__init__.py"), ("tests/test_notes.py", "test_notes.py")])
def test_shows_the_example_whole(name: str, file: str) -> None:
    """A newcomer types what the tests have run; only there the package lies elsewhere."""
    assert shown("Protect a route of your own")[name] == (EXAMPLE / file).read_text().replace("tests.examples.notes", "notes")


def test_shows_an_application_that_registers_the_example() -> None:
    """The README's wsgi.py is ours and one line of the reader's."""
    written = shown("Protect a route of your own")["wsgi.py"].replace("from notes import blueprint\n", "")
    assert written.replace("app.register_blueprint(blueprint)\n", "") == (PROJECT / "wsgi.py").read_text().partition("\n\n")[2]


@pytest.mark.parametrize("variable", sorted(set(VARIABLES) - {"DYNO"}))
def test_explains_every_variable(variable: str) -> None:
    """What is read is described."""
    assert f"`{variable}`" in README
