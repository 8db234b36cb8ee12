"""The README and ``.env.example`` agree with the code."""

from __future__ import annotations

import re

import pytest
from dotenv import dotenv_values

import clerkhooks
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli.main import main
from clerkhooks.settings import PROJECT, VARIABLES, ServiceSettings

README = (PROJECT / "README.md").read_text()
ENV_EXAMPLE = PROJECT / ".env.example"
EXAMPLE = PROJECT / "tests/examples/notes"


def shown(section: str) -> dict[str, str]:
    """Return the Python files that a section shows, keyed by the name in the first line."""
    _, _, rest = README.partition(f"\n## {section}\n")
    text, _, _ = rest.partition("\n## ")
    return dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))


def rows_after(header: str) -> list[str]:
    """Return the first cell of each row in the table with this header line."""
    _, _, rest = README.partition(f"\n{header}\n")
    table, _, _ = rest.partition("\n\n")
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[1:]]


@pytest.mark.parametrize(
    ("name", "file"), [("notes.py", "app.py"), ("test_notes.py", "test_app.py")]
)
def test_shows_the_complete_example(name: str, file: str) -> None:
    """The tutorial shows the tested example; only the module's name differs."""
    code = (EXAMPLE / file).read_text().replace("tests.examples.notes.app", "notes")
    assert shown("Use the extension")[name] == code


def test_lists_exactly_the_variables_that_are_read() -> None:
    """The table of variables lists every variable of the settings, and no others."""
    cells = rows_after("| variable | default | meaning |")
    assert sorted(name for cell in cells for name in re.findall("`(.+?)`", cell)) == sorted(
        VARIABLES
    )


def test_env_example_lists_exactly_the_variables_that_are_read() -> None:
    """``.env.example`` lists each variable once, without a value, after a one-line comment."""
    lines = ENV_EXAMPLE.read_text().splitlines()
    names = [line.removesuffix("=") for line in lines if line and not line.startswith("#")]
    assert sorted(names) == sorted(VARIABLES)
    for name in names:
        at = lines.index(f"{name}=")
        assert lines[at - 1].startswith("# ")
        assert lines[at - 2] == ""


def test_env_example_needs_only_a_signing_secret(clerk: FakeClerk) -> None:
    """A signing secret is all that must be added to a copy of ``.env.example``."""
    secret = {"CLERK_WEBHOOK_SECRET": clerk.environ["CLERK_WEBHOOK_SECRET"]}
    copied = dotenv_values(ENV_EXAMPLE) | secret
    assert ServiceSettings.from_mapping(copied) == ServiceSettings.from_mapping(secret)


@pytest.mark.parametrize(
    ("variable", "field"),
    [
        ("CLERK_API_URL", "api_url"),
        ("CLERK_JWKS_KEEP_HOURS", "jwks_keep_hours"),
        ("DATABASE_POOL_SIZE", "pool_size"),
        ("DATABASE_URL", "database_url"),
        ("PORT", "port"),
        ("WEB_CONCURRENCY", "web_concurrency"),
    ],
)
def test_env_example_names_the_defaults(variable: str, field: str) -> None:
    """The comment above a variable states its default."""
    lines = ENV_EXAMPLE.read_text().splitlines()
    default = ServiceSettings.__dataclass_fields__[field].default
    assert re.search(
        rf"Default: {re.escape(str(default))}\b", lines[lines.index(f"{variable}=") - 1]
    )


@pytest.mark.parametrize("name", sorted(set(clerkhooks.__all__) - {"Outcome", "create_app"}))
def test_mentions_every_public_name(name: str) -> None:
    assert name in README


@pytest.mark.parametrize("command", sorted(main.commands))
def test_explains_every_command(command: str) -> None:
    assert re.search(rf"`(clerkhooks )?{command}\b", README)


def test_links_to_files_and_sections_that_exist() -> None:
    """Every relative link points to a file in the repository or to a heading."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert target in anchors or (PROJECT / target).exists()
