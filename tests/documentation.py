"""The pages of the documentation as tests read and run them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clerkhooks.settings import PROJECT

DOCS = PROJECT / "docs"
_FENCE = re.compile(
    r"^(?P<indent> *)```(?:\{code-block\} )?(?P<language>\w+)\n"
    r"(?:\s*:caption: (?P<caption>\S+)\n\n)?"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)

PRELUDE = """
set -euo pipefail
trap 'kill $(jobs -p)' EXIT
# The packages are installed already, and the internet is not available.
python3() { mkdir -p .venv/bin && touch .venv/bin/activate; }
pip() { :; }
npx() { :; }
"""
START = """{command} &
timeout 30 bash -c 'until : >/dev/tcp/127.0.0.1/{port}; do sleep 0.1; done' 2>/dev/null
"""
SERVERS = ("flask run", "gunicorn wsgi:app", "gunicorn app:app")
REPLACED = {"clerkhooks dev\n": "clerkhooks dev --once --port 0\n"}


@dataclass(frozen=True)
class Block:
    """A code block. *caption* is the name of the file that the block belongs to."""

    language: str
    caption: str | None
    text: str


def pages() -> list[Path]:
    """Return the source of every page."""
    return sorted(DOCS.rglob("*.md"))


def read_page(name: str) -> str:
    """Return the source of a page, such as ``reference/settings``."""
    return (DOCS / f"{name}.md").read_text()


def blocks(text: str) -> list[Block]:
    """Return the code blocks of a page in their order, without indentation."""
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        found.append(Block(match["language"], match["caption"], "\n".join(lines).rstrip() + "\n"))
    return found


def first_cells(text: str, heading: str) -> Iterator[list[str]]:
    """Yield the code spans in the first cell of each row, in tables headed by *heading*."""
    for table in re.findall(rf"^\| {heading} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            yield re.findall(r"`([^`]+)`", row.split(" | ")[0])


def names_in(page: str, heading: str) -> list[str]:
    """Return the code spans in the first column of a page's tables with this *heading*."""
    return [name for cell in first_cells(read_page(page), heading) for name in cell]


def run_blocks(shown: list[Block], folder: Path, variables: dict[str, str]) -> str:
    """Write the files and run the shell commands of *shown* in *folder*; return the output."""
    script = PRELUDE + "".join(make_script(shown, variables["PORT"]))
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_script(shown: list[Block], port: str) -> Iterator[str]:
    """Yield the parts of a shell script that does what the blocks show."""
    for block in shown:
        if block.caption:
            yield f"cat >>{block.caption} <<'END'\n{block.text}\n\nEND\n"
        elif block.language == "sh":
            for line in block.text.splitlines(keepends=True):
                is_server = line.strip() in SERVERS
                command = START.format(command=line.strip(), port=port) if is_server else line
                # Bash does not exit after a failure in the middle of a && b && c.
                yield f"{REPLACED.get(command, command)}test $? = 0\n"
