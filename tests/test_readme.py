"""The README and ``.env.example`` agree with the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from dotenv import dotenv_values

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.cli.main import main
from clerkhooks.settings import PROJECT, VARIABLES, ServiceSettings
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.documentation import Block, blocks, read_page, run_blocks
from tests.server import environ, free_port

README = (PROJECT / "README.md").read_text()
ENV_EXAMPLE = PROJECT / ".env.example"
MAX_PICTURE = 150_000  # bytes


def section(name: str) -> str:
    """Return the text of a section."""
    _, _, rest = README.partition(f"\n## {name}\n")
    text, _, _ = rest.partition("\n## ")
    return text


def shown(name: str, language: str) -> list[Block]:
    """Return the code blocks of a section in one language."""
    return [block for block in blocks(section(name)) if block.language == language]


def test_is_short() -> None:
    """The README has at most 150 lines, and its application at most 25."""
    assert len(README.splitlines()) <= 150
    [code] = shown("Use the extension", "python")
    assert len(code.text.splitlines()) - 1 <= 25


def test_shows_what_the_demonstration_prints() -> None:
    """The output in the quickstart is that of ``clerkhooks dev``, except for ids and the date."""
    [block] = shown("Quickstart", "text")
    result = CliRunner().invoke(main, ["dev", "--once", "--port", "0"])
    assert mask(block.text.strip()) in mask(result.output)


def mask(text: str) -> str:
    """Replace ids and dates."""
    return re.sub(r"\d{4}-\d\d-\d\d", "DATE", re.sub(r"user_\w{27}", "ID", text))


def test_shows_an_application_that_works(
    clerk: FakeClerk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application keeps a user, and lets only signed-in users call its view."""
    [code] = shown("Use the extension", "python")
    for name, value in clerk.environ.items():
        monkeypatch.setenv(name, value)
    module = load_module(code.text, tmp_path / "app.py", monkeypatch)
    with module.app.app_context():
        module.db.create_all()
    service = ClerkService(module.app, clerk)
    user_id = service.sign_up(first_name="Ada", last_name="Lovelace", username="countess")
    answer = service.client(user_id).get("/hello").get_json()
    assert answer == {"hello": "Ada Lovelace", "plan": "free"}
    assert service.http.get("/hello").status_code == 401
    with module.app.app_context():
        assert module.db.session.get(module.User, user_id).username == "countess"
    disconnect(module.app)


def load_module(code: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write *code* to *file*, and import it until the end of the test."""
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("application_of_the_readme", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_shows_commands_that_work(tmp_path: Path) -> None:
    """The commands create the tables, start the application and deliver an event."""
    port, packages = str(free_port()), make_packages(tmp_path)
    variables = {"PORT": port, "FLASK_RUN_PORT": port, "PYTHONPATH": packages}
    [code] = shown("Use the extension", "python")
    (tmp_path / "app.py").write_text(code.text)
    commands = shown("Use the extension", "sh")
    output = run_blocks(commands, tmp_path, environ(**variables))
    assert '"outcome": "applied"' in output
    assert "Ada Lovelace  ada@example.org" in output


@pytest.mark.slow
def test_can_be_deployed(clerk: FakeClerk, tmp_path: Path) -> None:
    """The Procfile for applications migrates and serves the README's application."""
    page = blocks(read_page("how-to/deploy-application"))
    texts = {block.caption: block.text for block in page if block.caption}
    processes = dict(line.split(": ", 1) for line in texts["Procfile"].splitlines())
    [code] = shown("Use the extension", "python")
    fixed = 'app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///app.db"\n'
    assert fixed in code.text
    (tmp_path / "app.py").write_text("import os\n" + code.text.replace(fixed, texts["app.py"]))
    commands = (
        "flask --app app db init\nflask --app app db migrate\n",
        f"{processes['release']}\n{processes['web']}\n",
        "flask --app app clerk send user.created\n",
    )
    port, packages = str(free_port()), make_packages(tmp_path)
    variables = clerk.environ | {"PORT": port, "PYTHONPATH": packages}
    script = [Block("sh", None, command) for command in commands]
    assert '"outcome": "applied"' in run_blocks(script, tmp_path, environ(**variables))


def make_packages(folder: Path) -> str:
    """Return a folder with the package alone, without wsgi.py, which Flask prefers to app.py."""
    packages = folder / "packages"
    packages.mkdir()
    (packages / "clerkhooks").symlink_to(PROJECT / "clerkhooks")
    return str(packages)


def test_has_a_small_picture() -> None:
    """The picture of the console loads quickly."""
    [picture] = re.findall(r"!\[[^]]+\]\((.+?)\)", README)
    assert 0 < (PROJECT / picture).stat().st_size < MAX_PICTURE


def test_has_the_section_that_the_demonstration_mentions() -> None:
    """``clerkhooks dev`` refers to a section of the README."""
    source = (PROJECT / "clerkhooks/cli/dev.py").read_text()
    for name in re.findall(r'follow "(.+?)" in README.md', source):
        assert section(name)


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


def test_changelog_begins_with_the_version() -> None:
    """The newest release in the changelog is the package's version, with its date."""
    config = ConfigParser()
    config.read(PROJECT / "setup.cfg")
    changelog = (PROJECT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (\d\S+) - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert releases[0] == config["metadata"]["version"]


def test_shows_one_test_command() -> None:
    """``.ci/run`` takes the command from the README. CONTRIBUTING.md repeats it."""
    [command] = re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)
    assert command in (PROJECT / "CONTRIBUTING.md").read_text().splitlines()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_to_files_and_sections_that_exist(name: str) -> None:
    """Every relative link points to a file in the repository or to a heading."""
    text = Path(PROJECT / name).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            assert target in anchors or (PROJECT / target.partition("#")[0]).exists()
