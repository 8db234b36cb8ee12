"""Coroutines run from plain code, wherever that runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextvars import ContextVar

import pytest

from clerkhooks import coroutines

name: ContextVar[str] = ContextVar("name")

TWO_AT_ONCE = """
import gevent.monkey
gevent.monkey.patch_all()
import asyncio, gevent
from clerkhooks import coroutines

async def meet(mine, other):
    mine.set()
    while not other.is_set():
        await asyncio.sleep(0.001)
    return "met"

from gevent.event import Event
one, two = Event(), Event()
pair = [gevent.spawn(coroutines.run, meet(*both)) for both in ((one, two), (two, one))]
print([greenlet.get(timeout=20) for greenlet in pair])
"""


MANY_AT_ONCE = """
import gevent.monkey
gevent.monkey.patch_all()
import asyncio, socket, gevent
from clerkhooks import coroutines

started, released = [], []

async def wait():
    started.append(True)
    while not released:
        await asyncio.sleep(0.001)
    return 1

async def answer():
    return "answered"

view = coroutines.make_async_to_sync(12)(wait)
waiting = [gevent.spawn(view) for _ in range(40)]
while len(started) < 12:
    gevent.sleep(0.001)
with gevent.Timeout(20):
    socket.getaddrinfo("localhost", 80)
    print(coroutines.run(answer()))
released.append(True)
print(sum(greenlet.get(timeout=20) for greenlet in waiting))
"""

FAILING = """
import gevent.monkey
gevent.monkey.patch_all()
import asyncio
from clerkhooks import coroutines

async def fail():
    raise KeyError("secret")

try:
    coroutines.run(fail())
except KeyError as error:
    print(error.args)
"""


async def greet(greeting: str) -> str:
    """What the caller's context says, a moment later."""
    await asyncio.sleep(0)
    return f"{greeting} {name.get()}"


async def fail() -> None:
    """Raise."""
    raise KeyError("gone")


def test_runs_in_the_callers_context() -> None:
    """And gives the caller what comes of it, an error too."""
    name.set("Ada")
    assert coroutines.run(greet("Hello")) == "Hello Ada"
    with pytest.raises(KeyError, match="gone"):
        coroutines.run(fail())


def test_runs_as_many_as_there_are_greenlets() -> None:
    """With one loop a thread, and all greenlets in one, the second would be refused, and the first would hold up all others."""
    done = subprocess.run([sys.executable, "-c", TWO_AT_ONCE], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "['met', 'met']\n", done.stderr


def test_keeps_nobody_from_looking_up_a_name() -> None:
    """However many async views wait, names are looked up and keys are fetched meanwhile."""
    done = subprocess.run([sys.executable, "-c", MANY_AT_ONCE], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "answered\n40\n", done.stderr


def test_lets_gevent_print_no_error() -> None:
    """It would write the text, which may hold anything, past the log."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("('secret',)\n", "")
