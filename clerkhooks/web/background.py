"""The background work of a worker of the service. A lease chooses one worker of all hosts."""

from __future__ import annotations

import threading
import time

from flask import Flask

from clerkhooks.sync.follower import Follower
from clerkhooks.sync.lease import LeasedLoop, Tell
from clerkhooks.web.state import EXTENSION, State

START_DELAY = 0.2  # seconds, in which the worker begins to serve


def start_background(app: Flask) -> None:
    """Start each loop in a thread of this process, or in a greenlet under gevent."""
    state: State = app.extensions[EXTENSION]
    state.loops = _make_loops(state)
    for loop in state.loops:
        name = f"clerkhooks-{loop.lease.name}"
        threading.Thread(target=_run, args=(app, loop), name=name, daemon=True).start()


def stop_background(app: Flask) -> None:
    """Release the leases before this process exits, so that another process continues at once."""
    for loop in app.extensions[EXTENSION].loops:
        loop.stop()


def make_follower(state: State, tell: Tell | None = None) -> Follower:
    """Make a follower. *tell* receives its events, which are otherwise logged."""
    return Follower(state.store, state.settings, state.deliveries.handled, tell)


def _make_loops(state: State) -> list[LeasedLoop]:
    """Return the loops that the settings switch on."""
    settings = state.settings
    follows = settings.secret_key is not None and settings.follow
    return [make_follower(state)] if follows else []


def _run(app: Flask, loop: LeasedLoop) -> None:
    time.sleep(START_DELAY)
    with app.app_context():
        loop.run()
