"""
Measure a cold start: installation, imports, commands, and the time to the first response.

    python -m tests.benchmarks.cold [--here] [--rounds 5]

It builds the wheels of the service and its dependencies, installs them offline into an empty
environment, and measures the rest there. With ``--here`` it installs nothing and measures the
current environment. Times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import PROJECT
from tests.benchmarks.load import median_ratio
from tests.conftest import migrate
from tests.server import Server, environ, free_port

CLERK = FakeClerk()
SOURCES = ("clerkhooks", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
IMPORTS = (
    *(
        "import clerkhooks",
        "from clerkhooks import ClerkHooks",
        "from clerkhooks import create_app",
    ),
    "import flask, flask_sqlalchemy, psycopg",  # for comparison
)
BARE = """
import cryptography.hazmat.primitives.asymmetric.rsa
import dotenv, flask_cors, flask_migrate, flask_sqlalchemy
import httpx, jwt, psycopg, sqlalchemy, standardwebhooks
from flask import Flask
app = Flask("bare")
@app.get("/healthz")
def healthz():
    return {}
"""


def install(folder: Path) -> Path:
    """Install the service from wheels; print time and sizes; return the folder of executables."""
    source, wheels, home = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    for path in map(PROJECT.joinpath, SOURCES):  # a build leaves files in the source
        copy: Callable[..., object] = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / path.name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "--wheel-dir", str(wheels), str(source)], check=True)
    venv.create(home)
    began = time.monotonic()
    offline = ("install", "--no-index", "--find-links", str(wheels), "clerkhooks")
    subprocess.run([*pip, "--python", str(home / "bin/python"), *offline], check=True)
    print(f"{'pip install from local wheels':52} {time.monotonic() - began:7.2f} s")
    print_sizes(next(home.glob("lib/python*/site-packages")))
    return home / "bin"


def print_sizes(folder: Path) -> None:
    """Print the total size of all installed distributions, and the sizes of the largest ones."""
    sizes = Counter({one.name: _megabytes(one) for one in distributions(path=[str(folder)])})
    largest = ", ".join(f"{name} {size:.1f}" for name, size in sizes.most_common(8))
    print(f"{f'{len(sizes)} distributions':52} {sizes.total():7.1f} MB: {largest}")


def _megabytes(distribution: Distribution) -> float:
    files = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6


def time_command(command: Sequence[str], rounds: int) -> float:
    """Return the median duration of a command, after one run that is not measured."""
    took = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        took.append(time.monotonic() - began)
    return statistics.median(took[1:])


def print_imports(python: str, statement: str) -> None:
    """Print the packages that take the longest to import, excluding what they import."""
    command = [python, "-X", "importtime", "-c", statement]
    ended = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    spent: Counter[str] = Counter()
    for own, package in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\w+)", ended.stderr, re.M):
        spent[package] += int(own)
    slowest = ", ".join(f"{name} {own / 1000:.0f}" for name, own in spent.most_common(8))
    print(f"{'':52} {spent.total() / 1000:7.0f} ms traced: {slowest}", flush=True)


def time_start(programs: Path, folder: Path, rounds: int) -> None:
    """Print the time to the first 200 response, absolute and relative to bare Flask."""
    url = f"sqlite:///{folder}/start.db"
    migrate(url, CLERK)
    (folder / "bare.py").write_text(BARE)
    gunicorn = str(programs / "gunicorn")
    bare_command = [gunicorn, "--preload", "-w", "2", "-k", "gevent", "bare:app"]
    variables = CLERK.environ | {"DATABASE_URL": url, "WEB_CONCURRENCY": "2"}
    ours, bare = [], []
    for _ in range(rounds):
        ours.append(_start([gunicorn, "wsgi:app"], PROJECT, variables))
        bare.append(_start(bare_command, folder, {}))
    print(f"{'gunicorn wsgi:app to the first 200 of /healthz':52} {statistics.median(ours):7.2f} s")
    ratio = f"{median_ratio(ours, bare):7.2f}"
    print(f"{'  relative to bare Flask with the same imports':52} {ratio}", flush=True)


def _start(command: Sequence[str], cwd: Path, variables: dict[str, str]) -> float:
    port, began = free_port(), time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environ(**variables | {"PORT": str(port)}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        server = Server(process, "", port, Path(os.devnull), CLERK)
        while not _is_healthy(server):
            assert time.monotonic() < began + 60, "the server did not start within a minute"
            assert process.poll() is None, "the server has exited"
            time.sleep(0.002)
        return time.monotonic() - began
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def _is_healthy(server: Server) -> bool:
    with contextlib.suppress(OSError):
        return server.request("GET", "/healthz").status == 200
    return False


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each part of a cold start."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="measure the current environment")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = Path(sys.executable).parent if options.here else install(folder)
        python = str(programs / "python")
        for statement in ("pass", *IMPORTS):
            took = time_command([python, "-c", statement], options.rounds)
            print(f"{f'python -c {statement!r}':52} {took * 1000:7.0f} ms", flush=True)
        print_imports(python, IMPORTS[1])
        took = time_command([str(programs / "clerkhooks"), "--help"], options.rounds)
        print(f"{'clerkhooks --help':52} {took * 1000:7.0f} ms", flush=True)
        time_start(programs, folder, options.rounds)


if __name__ == "__main__":
    main()
