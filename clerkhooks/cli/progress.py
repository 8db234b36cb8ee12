"""How far a long command is: a bar on a terminal, a plain line now and then elsewhere; on stderr, apart from the result."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

LINE_EVERY = 10.0  # seconds


class Progress:
    """What ``reconcile`` tells how far it is. Used as a context manager, it leaves the terminal in order."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what, self._total, self._done = "", 0, 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        """Nothing is shown yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self.end()

    def begin(self, what: str, total: int | None) -> None:
        """Show a new part, of *total* users if that is known."""
        self.end()
        self._what, self._total, self._done = what, total or 0, 0
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty() and total is not None:
            self._bar = click.progressbar(
                length=total,
                label=what,
                file=sys.stderr,
                show_pos=True,
                item_show_func=lambda _: self._rate(),
            )
            self._bar.__enter__()

    def advance(self, count: int) -> None:
        """Show that *count* more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= LINE_EVERY:
            self._said = time.monotonic()
            self._say()

    def end(self) -> None:
        """The last part is over."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
        elif self._what:
            self._say()
        self._what = ""

    def _say(self) -> None:
        rate = self._done / max(time.monotonic() - self._began, 0.001)
        left = (
            f", {max(0, self._total - self._done) / rate:,.0f} s left"
            if rate and self._done < self._total
            else ""
        )
        of = f" of {self._total:,}" if self._total else ""
        click.echo(f"{self._what}: {self._done:,}{of}, {self._rate()}{left}", err=True)

    def _rate(self) -> str:
        return f"{self._done / max(time.monotonic() - self._began, 0.001):,.0f}/s"
