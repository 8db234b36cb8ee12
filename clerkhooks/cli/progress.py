"""The progress of a long command."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from itertools import repeat
from typing import Any

import click


class Progress(ExitStack):
    """
    Show progress on stderr: a bar on a terminal, elsewhere one line for each part.

    Leaving the context, or ``close()``, ends the current bar.
    """

    _bar: Any

    def begin(self, label: str, total: int | None) -> None:
        """Begin the next part, of *total* users if the number is known."""
        self.close()
        bar = click.progressbar(
            repeat(None), length=total, label=label, file=sys.stderr, show_pos=True
        )
        self._bar = self.enter_context(bar)

    def advance(self, count: int) -> None:
        """Add *count* users to the current part."""
        self._bar.update(count)
