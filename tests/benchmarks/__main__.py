"""
Run the benchmarks with options for short runs, and print the results.

    python -m tests.benchmarks [NAME ...]

Without names, all benchmarks run, one after the other. For longer runs and other options, run one
benchmark by itself: python -m tests.benchmarks.NAME --help
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from clerkhooks.settings import PROJECT

SHORT = {
    "console": "--users 50000",
    "disk": "--users 100000",
    "flood": "--messages 10000 --held 1000",
    "floor": "--rounds 3",
    "bare_sqlite": "--rounds 3",
    "hosts": "--seconds 4",
    "memory": "--requests 8000",
    "scale": "--users 10000 100000 --rounds 2 --seconds 2",
    "sync": "--users 50000",
}
"""Options that make a benchmark end within minutes."""


def find_benchmarks() -> dict[str, str]:
    """Return the summary of each module that has a ``main``, by name, without importing it."""
    return dict(_find_benchmarks(Path(__file__).parent))


def _find_benchmarks(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("[!_]*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield file.stem, (ast.get_docstring(tree) or "").partition("\n")[0]


def run(name: str) -> bool:
    """Run a benchmark in a separate process; return whether it succeeded."""
    command = ["-m", f"tests.benchmarks.{name}", *SHORT.get(name, "").split()]
    print(f"\n== python {' '.join(command)}", flush=True)
    began = time.monotonic()
    ended = subprocess.run([sys.executable, *command], cwd=PROJECT)
    print(f"== {name}: status {ended.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    return ended.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; return 1 if any of them failed."""
    found = find_benchmarks()
    lines = "\n".join(f"  {name:15} {summary}" for name, summary in found.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"{__doc__}\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default, all of them")
    names = parser.parse_args(argv).names
    if unknown := set(names) - found.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = [name for name in names or found if not run(name)]
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
