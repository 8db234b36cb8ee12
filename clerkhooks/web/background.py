"""The background work of the service's workers. On all hosts, one worker does each kind."""

from __future__ import annotations

import threading
import time
from typing import Any

from flask import Flask

from clerkhooks.events import Event, Handler
from clerkhooks.handler_transaction import call_handler
from clerkhooks.sync.change_handlers import ChangeHandlerLoop
from clerkhooks.sync.follower import Follower
from clerkhooks.sync.lease import LeasedLoop, Tell, stop_all
from clerkhooks.web.state import EXTENSION, State

START_DELAY = 0.2  # seconds, in which the worker begins to serve


def start_background(app: Flask) -> None:
    """Start each loop in a thread of this process, or in a greenlet under gevent."""
    state: State = app.extensions[EXTENSION]
    state.loops = _make_loops(app)
    for loop in state.loops:
        name = f"clerkhooks-{loop.lease.name}"
        threading.Thread(target=run_loop, args=(app, loop), name=name, daemon=True).start()


def stop_background(app: Flask) -> None:
    """Release the leases before this process exits, so that another process continues at once."""
    stop_all(app.extensions[EXTENSION].loops)


def make_follower(state: State, tell: Tell | None = None) -> Follower:
    """Make a follower. *tell* receives its events, which are otherwise logged."""
    return Follower(state.store, state.settings, state.deliveries.handled, tell)


def make_handler_loops(app: Flask, tell: Tell | None = None) -> list[LeasedLoop]:
    """Make a loop for each durable handler. *tell* receives their events."""

    def call(handler: Handler, event: Event[Any]) -> None:
        try:
            with app.app_context():  # each call has a session of its own
                call_handler(handler, event)
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            # SystemExit, gevent.Timeout or CancelledError would end the loop without a log event.
            raise RuntimeError(f"A handler raised {type(error).__name__}.") from error

    state: State = app.extensions[EXTENSION]
    durable = state.handlers.durable.values()
    return [ChangeHandlerLoop(state.store, each, call, tell) for each in durable]


def _make_loops(app: Flask) -> list[LeasedLoop]:
    """Return the loops that the settings and the handlers need."""
    state: State = app.extensions[EXTENSION]
    settings = state.settings
    follows = settings.secret_key is not None and settings.follow
    loops: list[LeasedLoop] = [make_follower(state)] if follows else []
    return [*loops, *make_handler_loops(app)]


def run_loop(app: Flask, loop: LeasedLoop) -> None:
    """Run *loop* in the context of *app* until it is stopped."""
    time.sleep(START_DELAY)
    loop.run(app.app_context)  # what handlers leave open is closed after each round
