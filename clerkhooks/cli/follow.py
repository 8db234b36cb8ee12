"""``sync --follow``: keep the tables up to date without webhooks."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import click
from flask import current_app

from clerkhooks.cli.options import printable
from clerkhooks.web.background import make_follower
from clerkhooks.web.state import current_state


def follow(as_json: bool) -> None:
    """Follow Clerk until this process is interrupted or terminated. Print each event."""
    follower = make_follower(current_state(), print_event_json if as_json else print_event)
    with interrupts(follower.interrupt):
        try:
            with suppress(KeyboardInterrupt):
                follower.run(current_app.app_context)
        finally:
            follower.stop()


class Interruption:
    """
    Whether a signal has arrived.

    This is not a ``threading.Event``: its lock is not reentrant, and the signal may arrive while
    the main thread holds it.
    """

    has_arrived = False

    def note(self) -> None:
        """Record that the signal has arrived."""
        self.has_arrived = True


@contextmanager
def interrupts(note: Callable[[], object]) -> Iterator[None]:
    """
    End the block with KeyboardInterrupt at SIGINT or SIGTERM, after a call of *note*.

    Python ignores the exception in destructors and callbacks of weak references, so a loop must
    also check what *note* has changed. *note* must not wait for a lock.
    """

    def interrupt(*_: object) -> None:
        note()
        raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(each, interrupt) for each in signals]
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for each, handler in zip(signals, previous, strict=True):
            signal.signal(each, handler)


def print_event(event: str, fields: Mapping[str, object]) -> None:
    """Print an event of background work as text."""
    text = "  ".join(f"{name}={printable(value)}" for name, value in fields.items())
    click.echo(f"{printable(datetime.now(UTC))}  {event}  {text}".rstrip())


def print_event_json(event: str, fields: Mapping[str, object]) -> None:
    """Print an event of background work as JSON."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    click.echo(json.dumps({"time": moment, "event": event, **fields}))
