"""The reference lists exactly what the code has. Other pages mention only what exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.fixtures import FixtureFunctionDefinition
from sqlalchemy.engine import make_url

import clerkhooks
from clerkhooks import Membership, payloads, testing
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, stored_types
from clerkhooks.clerk.session_tokens import Session
from clerkhooks.cli.commands import clerk
from clerkhooks.cli.main import main
from clerkhooks.doctor.database import plain_store
from clerkhooks.errors import _BACKEND_API_REMEDIES, ClerkhooksError, SettingsError
from clerkhooks.events import CHANGES, Outcome
from clerkhooks.settings import EPHEMERAL_PLATFORMS, PROJECT, VARIABLES, VERSION_TABLE
from clerkhooks.store.activity import STORED
from clerkhooks.store.changes import CHANNEL
from clerkhooks.store.pool import Overloaded
from clerkhooks.web.problems import _REASONS
from tests.conftest import MakeService
from tests.documentation import DOCS, blocks, names_in, pages, read_page
from tests.following import complete_round
from tests.support import user_event

SOURCES = [*sorted((PROJECT / "clerkhooks").rglob("*.py")), PROJECT / "gunicorn.conf.py"]
PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
STORED_KINDS = (USER, ORGANIZATION, MEMBERSHIP)
TABLES = plain_store(
    make_url("sqlite:///no.db"), ("organizations", "changes")
).users.metadata.tables
EXTERNAL = ("https://", "http://", "mailto:")


# Settings, commands and tables


def test_lists_every_variable() -> None:
    assert sorted(names_in("reference/settings", "variable")) == sorted(VARIABLES)


@pytest.mark.parametrize("variable", EPHEMERAL_PLATFORMS)
def test_names_the_variables_of_platforms(variable: str) -> None:
    """The reference names each variable by which an ephemeral platform is recognized."""
    assert f"`{variable}`" in read_page("reference/settings")


def test_lists_every_command() -> None:
    """Each command has a section with the output of its ``--help``."""
    page = read_page("reference/commands")
    headings = re.findall(r"^### (\S+)\n\n```\{command-help\} (\S+)$", page, re.MULTILINE)
    assert [first for first, _ in headings] == [second for _, second in headings]
    assert sorted(name for name, _ in headings) == sorted(main.commands)


def test_names_the_commands_of_the_service() -> None:
    """The page names the commands that applications do not have."""
    [names] = re.findall(r"The commands (.+) concern the service", read_page("reference/commands"))
    own = main.commands.keys() - clerk.commands.keys()
    assert set(re.findall(r"`(\w+)`", names)) == own


@pytest.mark.parametrize("table", TABLES)
def test_lists_every_column(table: str) -> None:
    """The section of a table lists its columns in their order."""
    _, _, rest = read_page("reference/tables").partition(f"\n## {table}\n")
    listed = re.findall(r"^\| `(\w+)` \| (\w+)", rest.partition("\n## ")[0], re.MULTILINE)
    names = {
        "TEXT": "text",
        "BOOLEAN": "boolean",
        "BIGINT": "bigint",
        "INTEGER": "integer",
        "JSON": "json",
    }
    columns = TABLES[table].columns
    assert listed == [(one.name, names.get(str(one.type), "time")) for one in columns]


def test_names_the_version_table() -> None:
    assert f"\n## {VERSION_TABLE}\n" in read_page("reference/tables")


# HTTP, events and Python


def test_lists_every_reason() -> None:
    """The tables of reasons list each reason in the code, and no others."""
    listed = names_in("reference/http", "reason") + names_in("reference/commands", "reason")
    assert set(listed) == set(find_reasons())


def test_lists_every_outcome() -> None:
    """The tables of outcomes list what is returned and what is stored."""
    assert set(names_in("reference/events", "outcome")) == set(Outcome)
    assert set(names_in("reference/http", "outcome")) == set(Outcome) - {Outcome.FAILED}
    stored = re.search(r"^\| `outcome` .* \| (.+?)\. \|$", read_page("reference/tables"), re.M)
    assert stored is not None
    assert set(re.findall(r"`(\w+)`", stored[1])) == set(STORED)


def test_lists_every_event() -> None:
    """The tables list the events that change tables, and the changes of the account state."""
    events = {*stored_types(STORED_KINDS), *CHANGES}
    assert set(names_in("reference/events", "event")) == events


def test_lists_every_public_name() -> None:
    """The Python API documents each public name once."""
    page = read_page("reference/python")
    documented = re.findall(r"\.\. (?:auto\w+|py:data):: clerkhooks\.(\w+)", page)
    assert sorted(documented) == sorted(clerkhooks.__all__)


def test_lists_every_attribute_of_a_session() -> None:
    """The table of ``current_session`` lists each public attribute."""
    names = names_in("reference/python", "name")
    public = {name for name in dir(Session) if not name.startswith("_")}
    assert {name.partition("(")[0] for name in names} == public


def test_lists_every_attribute_of_a_membership() -> None:
    assert names_in("reference/python", "attribute") == [*Membership.__dataclass_fields__]


def test_lists_every_type_of_event_data() -> None:
    """The table lists each type with the events in its docstring, and the text counts them."""
    page = read_page("reference/python")
    rows = re.findall(r"^\| `(\w+)` \| (`\w+\.\w+`.*) \|$", page, re.MULTILINE)
    listed = {name: re.findall(r"`([\w.]+)`", events) for name, events in rows}
    documented = {name: value.__doc__ or "" for name, value in vars(payloads).items()}
    assert listed == {
        name: re.findall(r"``(\w+\.\w+)``", text)
        for name, text in documented.items()
        if text.strip().startswith("The data of ")
    }
    [count] = re.findall(r"each of Clerk's (\d+) event types", page)
    assert sum(map(len, listed.values())) == int(count) + len(CHANGES)


def test_lists_every_fixture() -> None:
    """The page about pytest lists the plugin's fixtures with their scopes, and its class."""
    page = read_page("reference/pytest")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert dict(listed) == fixtures()
    assert re.findall(r"autoclass:: clerkhooks\.testing\.(\w+)", page) == ["ClerkService"]


def test_lists_every_member_of_the_state() -> None:
    """The members of ``/api/me`` in the reference are those of the response."""
    [shown] = [block for block in blocks(read_page("reference/http")) if "imageUrl" in block.text]
    source = (PROJECT / "clerkhooks/web/me.py").read_text()
    members = set(re.findall(r'"(\w+)": ', source.partition("def _shape")[2]))
    assert set(json.loads(shown.text)) == members


# Metrics and logs


def test_lists_every_metric(make_service: MakeService) -> None:
    """The table lists each exported metric with its type, and no others."""
    token = "a-token-of-sixteen-characters-or-more"
    own = {"CLERK_TABLES": "organizations,changes", "CLERK_SECRET_KEY": "sk_test_x"}
    service = make_service(METRICS_TOKEN=token, **own)
    complete_round(service)
    service.outcome(user_event(clerk_id("user")))
    response = service.http.get("/metrics", headers={"Authorization": f"Bearer {token}"})
    exported = dict(re.findall(r"^# TYPE (\w+) (\w+)$", response.text, re.MULTILINE))
    exported = {name: kind for name, kind in exported.items() if not name.endswith("_created")}
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", read_page("reference/metrics"), re.MULTILINE)
    assert dict(rows) == exported


def test_lists_every_log_event() -> None:
    """The table lists each event that the code logs, and no others."""
    assert set(names_in("reference/logs", "event")) == set(find_log_events())


# Every page


@PAGES
def test_links_to_files_that_exist(page: Path) -> None:
    """Relative links point to files. Sphinx checks the anchors."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith((*EXTERNAL, "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@PAGES
def test_belongs_to_a_table_of_contents(page: Path) -> None:
    """Every page except the first one is listed by the index of its folder."""
    if page != DOCS / "index.md":
        index = DOCS / "index.md" if page.name == "index.md" else page.with_name("index.md")
        name = page.relative_to(index.parent).with_suffix("").as_posix()
        assert name in index.read_text().splitlines()


@PAGES
def test_shows_commands_that_exist(page: Path) -> None:
    """Each command of clerkhooks in a shell block exists and has the options."""
    for block in blocks(page.read_text()):
        if block.language == "sh":
            for words in find_commands(block.text):
                check_command(words)


@PAGES
def test_mentions_commands_that_exist(page: Path) -> None:
    """Each ``clerkhooks …`` or ``flask clerk …`` in running text names a command."""
    spans = re.findall(r"`(?:clerkhooks|flask clerk) ([a-z]+)[^`]*`", page.read_text())
    assert set(spans) <= set(main.commands)


@PAGES
def test_mentions_modules_and_files_that_exist(page: Path) -> None:
    """Each ``python -m tests.…`` and each path below tests/ exists."""
    text = page.read_text()
    for module in re.findall(r"python -m (tests[.\w]*)", text):
        path = PROJECT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"\btests/[\w/.]+\w", text):
        assert (PROJECT / name).exists(), name


@PAGES
def test_mentions_metrics_that_exist(page: Path) -> None:
    """Each name with the prefix of the metrics is a metric, a fixture, a table or a channel."""
    known = {*names_in("reference/metrics", "metric"), *fixtures(), VERSION_TABLE, CHANNEL}
    assert set(re.findall(r"\bclerkhooks_\w+", page.read_text())) <= known


@PAGES
def test_shows_code_that_can_be_parsed(page: Path) -> None:
    """Blocks of Python, JSON and YAML are valid, and import only public names of clerkhooks."""
    parsers: dict[str, Callable[[str], Any]] = {
        "python": ast.parse,
        "json": json.loads,
        "yaml": yaml.safe_load,
    }
    for block in blocks(page.read_text()):
        parsed = parsers.get(block.language, str)(block.text)
        for node in ast.walk(parsed) if isinstance(parsed, ast.AST) else ():
            if isinstance(node, ast.ImportFrom) and node.module == "clerkhooks":
                assert {alias.name for alias in node.names} <= {*clerkhooks.__all__, "payloads"}


def test_loads_nothing_from_other_hosts() -> None:
    """The pages include no images, scripts, styles or fonts from other hosts."""
    for page in pages():
        assert not re.search(r"!\[[^]]*\]\(https?:", page.read_text()), page
    for file in (DOCS / "_static").iterdir():
        assert "http" not in file.read_text()


# Finding facts in the code


@cache
def nodes() -> tuple[ast.AST, ...]:
    """Return the nodes of all modules."""
    return tuple(node for file in SOURCES for node in ast.walk(ast.parse(file.read_text())))


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield each call in the code with the last part of the function's name."""
    for node in nodes():
        if isinstance(node, ast.Call):
            yield str(getattr(node.func, "id", getattr(node.func, "attr", ""))), node


def constants(node: ast.AST) -> list[str]:
    """Return the string constants that an expression may evaluate to."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.IfExp):
        return constants(node.body) + constants(node.orelse)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in constants(value)]
    return []


def find_reasons() -> set[str]:
    """Return the reason of each exception and of each problem response."""
    found = {*_REASONS.values(), *_BACKEND_API_REMEDIES}
    found |= {Overloaded().reason, SettingsError([]).reason}
    places = dict.fromkeys(exceptions(), 0) | {"problem": 1, "_require": 1, "unreadable": 0}
    for name, call in calls():
        if name in places and len(call.args) > places[name]:
            found.update(expand(call.args[places[name]]))
    found.update(kind.malformed for kind in STORED_KINDS)
    returned = (*returned_by("find_fault"), *returned_by("_find_refusal"))
    return found | {text for value in returned for text in constants(value)}


def returned_by(function: str) -> list[ast.expr]:
    """Return the expressions that a function returns."""
    body = [node for one in nodes() if is_function(one, function) for node in ast.walk(one)]
    return [node.value for node in body if isinstance(node, ast.Return) and node.value]


def is_function(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def fixtures() -> dict[str, str]:
    """Return the scope of each fixture of the plugin."""
    return {
        name: str(value._fixture_function_marker.scope)
        for name, value in vars(testing).items()
        if isinstance(value, FixtureFunctionDefinition)
    }


def exceptions() -> set[str]:
    """Return the names of all exceptions with a reason."""
    found, todo = set[str](), [ClerkhooksError]
    while todo:
        kind = todo.pop()
        found.add(kind.__name__)
        todo += kind.__subclasses__()
    return found


def expand(node: ast.AST) -> list[str]:
    """Return the values of a reason, which may be a template with the name of a claim."""
    if not isinstance(node, ast.JoinedStr):
        return constants(node)
    claims = [call.args[1] for name, call in calls() if name == "_parse_seconds"]
    [[start], [end]] = [constants(part) for part in node.values if isinstance(part, ast.Constant)]
    return [f"{start}{claim}{end}" for one in claims for claim in constants(one)]


def find_log_events() -> Iterator[str]:
    """Yield the event of each log line."""
    places = {"warning": 0, "error": 0, "info": 0, "log": 1, "makeRecord": 4}
    for name, call in calls():
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if owner == "logger" and name in places:
            yield from constants(call.args[places[name]])
        if name == "tell" and len(call.args) == 2:  # the follower's events
            yield from expand(call.args[0])


# Checking commands in pages


def find_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of clerkhooks in a shell script, without the program."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            is_ours = word.rpartition("/")[2] == "clerkhooks" and is_program(words[:at])
            is_flask = words[max(at - 1, 0) : at + 1] == ["flask", "clerk"]
            if (is_ours or is_flask) and words[at + 1 :]:
                yield words[at + 1 :]


def is_program(before: list[str]) -> bool:
    """Return whether the word after the words *before* is a program."""
    return not before or before[-1] in ("&&", "||", "|", "-m", "run") or "=" in before[-1]


def check_command(words: list[str]) -> None:
    """Check that a command exists, and that it has each long option in *words*."""
    name, *arguments = words
    options = {text for one in main.commands[name].params for text in one.opts}
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= options
